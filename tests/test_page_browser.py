"""The page of an explanation, in a real browser."""

import re
from dataclasses import replace

import pytest
import torch

from shapwrap import Audit
from tests.browser import chromium, requested
from tests.reports import HOSTILE, made_explanation, pictures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def driver(folder):
    with chromium(folder / "profile") as started:
        yield started


@pytest.fixture(scope="module")
def explanation():
    return made_explanation()


@pytest.fixture
def page(driver, folder, explanation):
    """The page of two images, freshly opened; nothing may have gone wrong when the test ends."""
    audit = Audit(torch.tensor([0.2, 0.9]), torch.tensor([1.0, 1.0]), 32)
    path = explanation.save(
        folder / "report.html", pictures(), audit=audit, captions=["first", HOSTILE]
    )
    requested(driver)
    opened = Page(driver, path)
    yield opened
    assert driver.get_log("browser") == []
    assert {url.split(":")[0] for url in requested(driver)} <= {"file", "data"}
    assert driver.title == "Patch values"


class Page:
    """What a person does with it."""

    def __init__(self, driver, path):
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self.wait = WebDriverWait(driver, 20)
        driver.get(path.as_uri())
        self.wait.until(lambda d: d.execute_script("return document.body.dataset.ready"))

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector, card=0):
        return self.all(".card")[card].find_element("css selector", selector)

    def text(self, selector, card=0):
        return self.one(selector, card).text

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def point(self, patch, grid, selector=".stage.map"):
        """Move the pointer to the centre of a patch."""
        from selenium.webdriver.common.action_chains import ActionChains

        stage = self.one(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
        width, height = stage.rect["width"], stage.rect["height"]
        x = ((patch % grid[1] + 0.5) / grid[1] - 0.5) * width
        y = ((patch // grid[1] + 0.5) / grid[0] - 0.5) * height
        ActionChains(self.driver).move_to_element_with_offset(stage, round(x), round(y)).perform()

    def search(self, words):
        found = self.one("input[type=search]")
        found.clear()
        found.send_keys(words)
        return self.all(".card")[0].find_elements("css selector", ".found button")

    def background(self):
        return self.driver.execute_script("return getComputedStyle(document.body).backgroundColor")


def number(text):
    return float(text.replace("\u2212", "-").replace("+", ""))


def test_pointing_reads_a_patch(page, explanation):
    for patch in (0, 9, 34):
        for stage in (".stage.map", ".stage.picture"):
            page.point(patch, explanation.grid, stage)
            value = float(explanation.values[0, patch])
            shown = page.text(".readout")
            assert shown.startswith(f"Row {patch // 7 + 1}, column {patch % 7 + 1}: ")
            size = 1 + int((explanation.values[0].abs() > abs(value)).sum())
            assert f"number {size} of 35" in shown
            told = page.text(".readout strong")
            assert told.endswith(" logit")
            assert number(told.removesuffix(" logit")) == pytest.approx(value, abs=5.01e-4)


def test_the_keyboard_reaches_classes_and_patches(page, explanation):
    from selenium.webdriver.common.keys import Keys

    page.driver.execute_script("document.querySelector('.reading summary').focus()")
    page.press(Keys.TAB)
    active = page.driver.switch_to.active_element
    assert active == page.one(".stage.map")
    strongest = int(explanation.values[0].abs().argmax())
    assert page.text(".readout").startswith(
        f"Row {strongest // 7 + 1}, column {strongest % 7 + 1}:"
    )
    assert (
        page.driver.execute_script("return getComputedStyle(arguments[0]).outlineWidth", active)
        != "0px"
    )
    page.press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    row = strongest // 7
    assert page.text(".readout").startswith(f"Row {row + 1}, column 2:")
    other = Keys.ARROW_DOWN if row == 0 else Keys.ARROW_UP
    page.press(other, Keys.END)
    assert page.text(".readout").startswith(f"Row {2 if row == 0 else row}, column 7:")
    page.press(Keys.ARROW_RIGHT)
    assert ", column 7:" in page.text(".readout"), "a border is a border"
    assert page.one(".readout").get_attribute("aria-live") == "polite"
    page.press(Keys.ESCAPE)
    assert page.text(".readout").startswith("Point at")
    page.press(Keys.TAB)
    order = explanation.logits[0].argsort(descending=True)
    assert page.driver.switch_to.active_element.get_attribute("data-class") == str(int(order[0]))
    page.press(Keys.ARROW_DOWN)
    assert page.driver.switch_to.active_element.get_attribute("data-class") == str(int(order[1]))
    assert f"thing {int(order[1])}" in page.text(".about")
    page.press(Keys.TAB)
    assert page.driver.switch_to.active_element == page.one("input[type=search]")


def test_a_class_that_is_searched_for(page, explanation):
    from selenium.webdriver.common.keys import Keys

    buttons = page.search("thing 39")
    expected = [
        k
        for k in explanation.logits[0].argsort(descending=True).tolist()
        if k in (39, *range(390, 400))
    ]
    assert [int(button.get_attribute("data-class")) for button in buttons] == expected
    assert page.text(".count") == "11 classes"
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    wanted = expected[1]
    page.wait.until(lambda _: f"thing {wanted}:" in page.text(".about"))
    assert not page.one(".found").is_displayed()
    values = explanation.all_values[0, :, wanted]
    step = float(values.abs().max()) / 127
    for patch in (3, 20):
        page.point(patch, explanation.grid)
        told = page.text(".readout strong")
        value, error = re.fullmatch(r"(\S+) ± (\S+) logit", told).groups()
        assert number(error) == pytest.approx(step / 2, rel=0.06), "two digits of the half step"
        unit = 10.0 ** -len(value.split(".")[1])
        assert unit >= step * 0.999, "no more digits than are kept"
        assert abs(number(value) - float(values[patch])) <= step / 2 + unit / 2
    assert "kept to ±" in page.text(".exactness")
    page.search("nothing of the kind")
    assert page.text(".count") == "0 classes"


@pytest.mark.parametrize("place", [0, 4, 200, 399])
def test_the_bar_sums_to_the_logit(page, explanation, place):
    """Of stored and of rounded classes, in the digits that are shown, without a remainder."""
    wanted = int(explanation.logits[0].argsort(descending=True)[place])
    [*_, button] = page.search(str(wanted))
    found = [b for b in page.all(".found button") if b.get_attribute("data-class") == str(wanted)]
    (found or [button])[0].click()
    page.wait.until(lambda _: f"number {place + 1} of 400" in page.text(".about") or not place)
    equation = page.text(".equation")
    left, right = equation.removesuffix(" logit").split(" = ")
    left = left.replace("\u2212", "-").replace(" ", "")
    decimals = len(right.split(".")[1])
    parts = [float(part) for part in re.findall(r"[+-]?[\d.]+", left)]
    assert round(sum(parts), decimals) == number(right)
    logit = float(explanation.logits[0, wanted])
    assert number(right) == pytest.approx(logit, abs=0.51 * 10**-decimals)
    assert parts[0] == pytest.approx(float(explanation.baseline[wanted]), abs=0.51 * 10**-decimals)
    values = explanation.all_values[0, :, wanted].double()
    for part, expected in zip(parts[1:3], (values.clamp(min=0), values.clamp(max=0)), strict=True):
        assert part == pytest.approx(float(expected.sum()), abs=0.51 * 10**-decimals + 1e-5)
    numbers = [number(cell.text) for cell in page.all(".card:first-child .sum .number")]
    assert numbers == [*parts, number(right)]
    assert "which is rounding" in page.text(".exactness")


def test_bars_are_as_long_as_the_values(page, explanation):
    """One picture of the sum: each patch's block, from end to end of its row."""
    blocks = page.all(".card:first-child rect.for.patch")
    values = explanation.values[0]
    largest = values[values > 0].sort(descending=True).values
    widths = torch.tensor([float(block.get_attribute("width")) for block in blocks])
    torch.testing.assert_close(
        widths / widths[0], largest[: len(widths)] / largest[0], atol=1e-3, rtol=1e-3
    )
    result = page.one("rect.result")
    scale = float(result.get_attribute("width")) / abs(float(explanation.logits[0].max()))
    assert float(widths[0]) == pytest.approx(scale * float(largest[0]), rel=1e-3)


def test_colours_legend_and_scales(page, explanation):
    pixels = "return [...arguments[0].getContext('2d').getImageData(0, 0, 7, 5).data]"
    drawn = torch.tensor(page.driver.execute_script(pixels, page.one(".stage canvas"))).reshape(
        35, 4
    )
    values = explanation.values[0]
    assert (drawn[values > 0][:, 0] >= drawn[values > 0][:, 2]).all(), "red speaks for"
    assert (drawn[values < 0][:, 2] >= drawn[values < 0][:, 0]).all(), "blue against"
    limits = [page.text(".legend-high", card) for card in (0, 1)]
    expected = [f"+{float(v.abs().max()):.2g}" for v in explanation.values]
    assert limits == expected
    page.driver.find_element("id", "shared").click()
    assert {page.text(".legend-high", card) for card in (0, 1)} == {
        f"+{float(explanation.values.abs().max()):.2g}"
    }
    options = page.driver.find_element("id", "range")
    options.find_element("css selector", "option[value='0.5']").click()
    assert page.text(".legend-high").startswith("≥ +")
    opacity = "return getComputedStyle(arguments[0]).opacity"
    page.driver.execute_script(
        "const slider = document.getElementById('opacity');"
        "slider.value = 20; slider.dispatchEvent(new Event('input'))"
    )
    assert page.driver.execute_script(opacity, page.one(".stage canvas")) == "0.2"


def test_trust_names_and_table(page, explanation):
    assert "skill 0.800" in page.text(".trust").replace("\n", " ")
    assert page.text(".trust .level").startswith("Fair skill")
    assert page.text(".trust .level", 1).startswith("Low skill")
    assert HOSTILE.split("\u2028")[0] in page.text("h2", 1)
    page.search("onerror")[0].click()
    page.wait.until(lambda _: "onerror" in page.text(".about"))
    assert page.all("img[src=x]") == []
    page.one(".values summary").click()
    page.wait.until(lambda _: page.all(".values td"))
    assert len(page.all(".card:first-child .values tbody td")) == 35
    everywhere = page.one(".everywhere")
    page.driver.execute_script("arguments[0].click()", everywhere)
    page.wait.until(lambda _: "onerror" in page.text(".about", 1))


def test_light_and_dark(page):
    light = page.background()
    page.driver.find_element("id", "theme").click()
    dark = page.background()
    assert dark != light
    assert page.driver.find_element("id", "theme").get_attribute("aria-pressed") == "true"
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    page.driver.find_element("id", "theme").click()
    assert page.background() == light
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    page.wait.until(lambda _: page.background() == dark)
    scheme["value"] = "light"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    page.wait.until(lambda _: page.background() == light)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(page, dark):
    """Contrast of every text against what is behind it: 4.5 to 1, as WCAG AA asks."""
    if dark:
        page.driver.find_element("id", "theme").click()
    found = page.driver.execute_script(CONTRAST)
    assert len(found) > 50
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []


CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (color) => color.slice(0, 3).map((c) => c / 255)
  .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * c, 0);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const color = rgb(getComputedStyle(at).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!own || !node.checkVisibility() || node.closest("script, noscript")) continue;
  const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.slice(0, 30)]);
}
return found;
"""


def test_one_class_says_so_and_a_phone_shows_it(driver, folder, explanation):
    one = replace(explanation, all_values=None, class_names=None, method="rise")
    one = replace(one, total=torch.full((2,), torch.nan))
    path = one.save(folder / "one.html", pictures())
    metrics = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page = Page(driver, path)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert "holds the values of one class" in page.text(".only-one")
    assert page.text(".about").startswith(f"class {int(one.target[0])}:")
    assert page.all("input[type=search]") == []
    assert "does not claim" in page.text(".exactness")
    assert page.text(".trust .level").startswith("Not measured")
    assert driver.get_log("browser") == []
