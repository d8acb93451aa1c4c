"""Which engine answers a prompt: what each has cached, what each has to do, and how a processor asks."""
