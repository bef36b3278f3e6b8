"""The report in headless Chromium: it draws, follows the theme, and its console stays silent."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from prunus.reporting import write_report
from report_record import HOSTILE, record, shrunk, write

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM.exists() and CHROMEDRIVER.exists()), reason="needs the packages chromium and chromium-driver"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(CHROMEDRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("runs")
    hostile = record(name=HOSTILE, sparsity=0.6)
    hostile["history"][0]["matrices"][0]["projection"] = HOSTILE
    runs = [write(root / "one", record()), write(root / "two", hostile), write(root / "three", shrunk())]
    return write_report(runs, root / "report.html").as_uri()


@pytest.fixture
def opened(browser: webdriver.Chrome, address: str) -> webdriver.Chrome:
    browser.get(address)
    return browser


def colours(browser: webdriver.Chrome) -> tuple[str, str]:
    """The page's background, and the ink of a plot's axis."""
    page = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    return page, browser.find_element(By.CSS_SELECTOR, ".plot .xtick text").value_of_css_property("fill")


def test_every_plot_is_drawn_and_nothing_is_complained_of(opened: webdriver.Chrome):
    plots = opened.find_elements(By.CLASS_NAME, "plot")
    assert len(plots) == 5 + 2 * 7 + 6
    for plot in plots:
        assert plot.find_elements(By.CSS_SELECTOR, "svg.main-svg"), plot.get_attribute("aria-label")
        assert plot.get_attribute("aria-label")
    assert opened.get_log("browser") == []
    assert opened.execute_script("return window.pwned") is None
    assert opened.execute_script("return performance.getEntriesByType('resource').map(r => r.name)") == []


def test_what_stays_is_marked_in_ink_that_shows(opened: webdriver.Chrome):
    heat = next(
        p for p in opened.find_elements(By.CLASS_NAME, "plot") if "Head importance" in p.get_attribute("aria-label")
    )
    dots = [one for one in heat.find_elements(By.CSS_SELECTOR, ".hm text") if one.text]
    assert len(dots) == 3
    paper = luminance(opened.execute_script("return resolve('var(--heat-2)')"))  # the highest score stays here
    for dot in dots:
        ink = luminance(dot.value_of_css_property("fill"))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 3


def test_the_toggle_works_from_the_keyboard_and_plots_follow(opened: webdriver.Chrome):
    before = colours(opened)
    toggle = opened.find_element(By.ID, "theme")
    pressed = toggle.get_attribute("aria-pressed")
    toggle.send_keys(Keys.ENTER)
    after = colours(opened)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert toggle.get_attribute("aria-pressed") != pressed
    toggle.send_keys(Keys.SPACE)
    assert colours(opened) == before


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance of a computed colour."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(opened: webdriver.Chrome, theme: str):
    opened.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    paper = luminance(opened.find_element(By.CSS_SELECTOR, "section").value_of_css_property("background-color"))
    for selector in ("main h2", ".card .answer", ".small", "figcaption", "summary", "dt"):
        ink = luminance(opened.find_element(By.CSS_SELECTOR, selector).value_of_css_property("color"))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector


def test_a_phone_scrolls_only_down(opened: webdriver.Chrome):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 780, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        opened.refresh()
        assert opened.execute_script("return document.documentElement.scrollWidth") == 360
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
