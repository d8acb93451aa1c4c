// What test_openai_clients.py runs in Node: the same question whole and streamed, and an error, as one line of JSON.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const asked = { model, messages: [{ role: "user", content: "Hello!" }], temperature: 0, max_tokens: 12 };

const whole = await client.chat.completions.create(asked);
const deltas = [];
let usage = null;
const stream = await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  if (chunk.choices.length > 0) deltas.push(chunk.choices[0].delta.content ?? "");
  usage = chunk.usage ?? usage;
}
const helper = client.chat.completions.stream(asked);
const helped = await helper.finalContent();
let error = null;
try {
  await client.chat.completions.create({ ...asked, temperature: 3 });
} catch (caught) {
  error = { name: caught.constructor.name, status: caught.status, param: caught.param, id: caught.requestID };
}
const models = [];
for await (const listed of client.models.list()) models.push(listed.id);
console.log(JSON.stringify({ whole, deltas, usage, helped, error, models }));
