"""Drop a file on a page in a headless browser (Qt WebEngine, which is Chromium) and save what it shows:

    python browser.py ADDRESS FILE SCREENSHOT

Prints as JSON what the page says, whether that is an error, and the image that it shows as a data URL.
"""

import base64
import json
import os
import sys
import time
from pathlib import Path

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # which root cannot have
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu"

from PyQt6.QtCore import QUrl  # noqa: E402
from PyQt6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PyQt6.QtWidgets import QApplication  # noqa: E402

SECONDS = 120
DROP = """
(contents => {
  const bytes = Uint8Array.from(atob(contents), c => c.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], 'dropped'));
  for (const kind of ['dragover', 'drop'])
    document.getElementById('place').dispatchEvent(
      new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: dropped}));
})('%s')"""
STATE = """
JSON.stringify((() => {
  const canvas = document.getElementById('image'), said = document.getElementById('said');
  const shown = canvas.width ? canvas.toDataURL('image/png') : '';
  return {said: said.textContent, error: said.className == 'error', shown};
})())"""


def main(address, file, screenshot):
    app = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(800, 900)
    view.show()
    until = time.monotonic() + SECONDS

    def wait(condition):
        while not condition():
            if time.monotonic() > until:
                sys.exit("the browser waited in vain")
            app.processEvents()
            time.sleep(0.01)

    def ask(script):
        answers = []
        view.page().runJavaScript(script, answers.append)
        wait(lambda: answers)
        return answers[0]

    loaded = []
    view.loadFinished.connect(loaded.append)
    view.load(QUrl(address))
    wait(lambda: loaded)
    if not loaded[0]:
        sys.exit(f"{address} did not load")
    ask(DROP % base64.b64encode(Path(file).read_bytes()).decode())
    wait(lambda: json.loads(ask(STATE))["said"] not in ("", "Looking ..."))
    shown = time.monotonic() + 1  # until it is painted
    wait(lambda: time.monotonic() > shown)
    view.grab().save(screenshot)
    print(ask(STATE))


if __name__ == "__main__":
    main(*sys.argv[1:])
