"""Takes the pictures of TensorBoard in docs/images: runs the demonstration, and opens it in a headless Chromium.

The extra ``docs``, Chromium and its driver are needed. With ``--check``, or without Chromium, a short run is made instead, and
TensorBoard is asked whether each page has something to show.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

IMAGES = Path(__file__).parent / "images"
LOGS = "lightning_noise_demo"  # where the demonstration writes
PINNED = ("robustness/score", "robustness/accuracy_clean", "robustness/accuracy_noisy", "train_noise/input/level")
PAGES = {  # the address of each page by its name in TensorBoard
    "timeseries": f"?pinnedCards={json.dumps([{'plugin': 'scalars', 'tag': tag} for tag in PINNED])}#timeseries",
    "custom_scalars": "#custom_scalars&_smoothingWeight=0",
    "images": "#images&tagFilter=curve|gaussian/samples",
    "hparams": "#hparams",
    "text": "#text",
}
SETTINGS = {  # more room for the time series
    "scalarSmoothing": 0,
    "sideBarWidthInPercent": 24,
    "stepSelectorEnabled": False,
    "timeSeriesSettingsPaneOpened": False,
}
WIDTH, HEIGHT = 1280, 800
PATIENCE = 120  # seconds


def main() -> None:
    """Takes the pictures, or checks that there is something to take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="make a short run and ask TensorBoard for its pages")
    takes_pictures = not parser.parse_args().check
    if takes_pictures and find_chromium() is None:
        print("no Chromium: the pages are checked, and no pictures are taken")
        takes_pictures = False
    with tempfile.TemporaryDirectory() as folder:
        options = [] if takes_pictures else ["--epochs=2"]
        subprocess.run([sys.executable, "-m", "lightning_noise", *options], cwd=folder, check=True)
        with serve(folder) as address:
            check_pages(address)
            if takes_pictures:
                take_pictures(address)


def find_chromium() -> str | None:
    """Returns the path of Chromium or Chrome, or ``None`` if neither is installed."""
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def serve(folder: str) -> Iterator[str]:
    """Yields the address of a TensorBoard that shows the logs in a folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", LOGS, "--host", "localhost", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait()


def check_pages(address: str) -> None:
    """Waits until each page has something to show, or raises a TimeoutError."""
    until = time.monotonic() + PATIENCE
    empty = list(PAGES)
    while empty and time.monotonic() < until:
        time.sleep(1)
        try:
            with urlopen(f"{address}/data/plugins_listing", timeout=PATIENCE) as answer:
                plugins = json.load(answer)
        except (URLError, ConnectionError):  # not started yet
            continue
        empty = [page for page in PAGES if not plugins[page]["enabled"]]
    if empty:
        raise TimeoutError(f"TensorBoard has nothing to show on the pages {empty}")


def take_pictures(address: str) -> None:
    """Writes a picture of each page, in 256 colors."""
    from PIL import Image

    with browse() as browser:
        browser.get(address)
        settings = json.dumps(SETTINGS)
        browser.execute_script("localStorage.setItem('_tb_global_settings', arguments[0])", settings)
        for page, rest in PAGES.items():
            browser.get("about:blank")  # otherwise the browser would not load the page again
            browser.get(f"{address}/{rest}")
            picture = Image.open(io.BytesIO(wait_for_picture(browser))).convert("RGB")
            path = IMAGES / f"{page}.png"
            picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(path)


@contextmanager
def browse() -> Iterator[Any]:
    """Yields a headless browser whose page has the size of the pictures."""
    from selenium import webdriver  # pyright: ignore[reportMissingImports]

    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(option)
    options.binary_location = find_chromium() or ""
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield browser
    finally:
        browser.quit()


def wait_for_picture(browser: Any) -> bytes:
    """Returns the picture of the page once it has been the same for four seconds."""
    until = time.monotonic() + PATIENCE
    pictures: list[bytes] = []
    while time.monotonic() < until:
        pictures = [*pictures[-4:], browser.get_screenshot_as_png()]
        if len(pictures) == 5 and len({*pictures}) == 1:
            return pictures[-1]
        time.sleep(1)
    raise TimeoutError(f"the page {browser.current_url} does not come to rest")


if __name__ == "__main__":
    main()
