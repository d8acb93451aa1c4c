"""Takes the picture in the README from a running pipeline, such as `make run`:

python -m tests.live_page_screenshot http://localhost:8080 docs/live-page.png
"""

import sys

from tests.browsers import chromium

QUESTIONS = ("What is the capital of France?", "And what is it known for? One sentence.")
PATIENCE_MS = 120_000


def main(url: str, file: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 940})
        page.goto(url)
        page.locator("#processors .box").wait_for()
        page.locator("#model option").first.wait_for(state="attached")
        page.get_by_label("Tokens at most").fill("80")
        for number, question in enumerate(QUESTIONS):
            page.get_by_label("Message").fill(question)
            page.keyboard.press("Enter")
            page.locator(".path").nth(number).wait_for(timeout=PATIENCE_MS)
        page.screenshot(path=file)


if __name__ == "__main__":
    main(*sys.argv[1:])
