"""Takes the picture in the README from a running pipeline, such as `make run`:

python -m tests.live_page_screenshot http://localhost:8080 docs/live-page.png
"""

import sys

from tests.browsers import chromium

QUESTION = "Name the capital of France."
PATIENCE_MS = 120_000
SETTLED_MS = 500


def main(url: str, file: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 910})
        page.goto(url)
        page.locator("#processors .box").first.wait_for()
        page.locator("#model option").first.wait_for(state="attached")
        page.get_by_label("Tokens at most").fill("64")
        page.get_by_label("Message").fill(QUESTION)
        page.keyboard.press("Enter")
        page.locator(".path").wait_for(timeout=PATIENCE_MS)
        page.wait_for_timeout(SETTLED_MS)  # the boxes' colours fade in
        page.screenshot(path=file)
        print(page.locator(".turn .text").last.inner_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
