"""Take the picture of a page: python -m tests.report.screenshot PAGE PICTURE [--width W] [--height H] [--dark]."""

import argparse
import base64
import tempfile
from pathlib import Path

from tests.report.chromium import set_view, start_chromium

MOST_BYTES = 400_000


def take_picture(page: Path, picture: Path, width: int, height: int, scheme: str) -> None:
    """Write a PNG of the top of a page.

    Raises:
        ValueError: The picture is larger than a README should load.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = start_chromium(Path(profile))
        try:
            set_view(driver, width, height, scheme)
            driver.get(page.resolve().as_uri())
            png = base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])
        finally:
            driver.quit()
    if len(png) > MOST_BYTES:
        raise ValueError(f"the picture has {len(png):,} bytes, more than {MOST_BYTES:,}: make it smaller")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(png)


def main() -> None:
    """Read the command line and take the picture."""
    parser = argparse.ArgumentParser(description="Take the picture of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280, help="CSS pixels")
    parser.add_argument("--height", type=int, default=1330, help="CSS pixels")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    take_picture(options.page, options.picture, options.width, options.height, "dark" if options.dark else "light")


if __name__ == "__main__":
    main()
