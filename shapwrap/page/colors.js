// Diverging colours: blue against, red for, white at zero; told apart without red-green vision.

const STOPS = [
  [5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [247, 247, 247],
  [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31],
];

// The colour of a value in units of the limit.
const colorOf = (share) => {
  const place = ((clamp(share, -1, 1) + 1) / 2) * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[low].map((from, i) => Math.round(from + (place - low) * (STOPS[low + 1][i] - from)));
};

class Legend {
  constructor(unit) {
    this.unit = unit;
    const bar = element("canvas", { width: 129, height: 1, class: "legend-bar", "aria-hidden": "true" });
    const drawn = bar.getContext("2d");
    for (let i = 0; i < 129; i++) {
      drawn.fillStyle = `rgb(${colorOf((i - 64) / 64).join(" ")})`;
      drawn.fillRect(i, 0, 1, 1);
    }
    this.low = element("span", { class: "legend-low" });
    this.high = element("span", { class: "legend-high" });
    this.root = element(
      "div", { class: "legend" }, bar,
      element("div", { class: "legend-ticks" }, this.low, element("span", {}, "0"), this.high),
      element("div", { class: "legend-ends" },
        element("span", {}, "against"), element("span", {}, `${unit} a patch`), element("span", {}, "for")),
    );
  }

  // `clipped` says that stronger values have the colour of the limit.
  set(limit, clipped) {
    const text = brief(limit);
    this.low.textContent = `${clipped ? "\u2264 " : ""}\u2212${text}`;
    this.high.textContent = `${clipped ? "\u2265 " : ""}+${text}`;
  }
}

