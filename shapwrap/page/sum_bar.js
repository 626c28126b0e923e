// How the patch values add up: a waterfall from the baseline to the logit, and the same as numbers.

const SVG = "http://www.w3.org/2000/svg";
const LENGTH = 1000;

const shape = (tag, attributes) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

class SumBar {
  constructor(report, store, { onPoint }) {
    this.report = report;
    this.store = store;
    this.onPoint = onPoint;
    this.body = element("tbody");
    this.equation = element("p", { class: "equation" });
    this.exactness = element("p", { class: "exactness" });
    this.root = element(
      "section", { class: "sum" },
      element("table", {}, element("caption", {}, "How the values add up"), this.body),
      this.equation, this.exactness,
    );
  }

  // Terms in the order of the sum, and what they must make.
  terms(stored) {
    const { image } = this.store;
    const { k, positive, negative } = stored;
    const terms = [];
    if (image.claim === "logit") {
      terms.push({ name: "baseline: no patch", part: "rest", value: this.store.baseline(k) });
      if (this.report.contrast) terms.push({ name: "mean of all classes", part: "rest", value: image.meanGain });
    }
    let [up, down] = [0, 0];
    for (const value of stored.values) {
      if (value > 0) up++;
      else if (value < 0) down++;
    }
    const count = (n) => (stored.exact ? `${grouped(n)} ${n === 1 ? "patch" : "patches"}` : "patches");
    terms.push({ name: `${count(up)} for`, part: "for", value: positive });
    terms.push({ name: `${count(down)} against`, part: "against", value: negative });
    const sum = terms.reduce((total, term) => total + term.value, 0);
    const result = { logit: this.store.logits[k], total: image.total, none: sum }[image.claim];
    return { terms, sum, result };
  }

  show(stored) {
    const { terms, sum, result } = this.terms(stored);
    const { unit } = this.report;
    const largest = Math.max(Math.abs(result), ...terms.map((term) => Math.abs(term.value)));
    const decimals = decimalsOf(largest, 5);
    const scale = 10 ** decimals;
    const shown = (x) => Math.round(x * scale);
    const missing = shown(result) - terms.reduce((total, term) => total + shown(term.value), 0);
    const gap = Math.abs(result - sum);
    const explained = gap <= 1e-4 * Math.max(largest, 1e-12);
    if (missing !== 0) {
      const name = explained ? "rounding of these numbers" : "not explained by any patch";
      terms.push({ name, part: "rest", value: missing / scale });
    }
    this.draw(stored, terms, result, decimals);
    const parts = terms.map(({ value }, i) => {
      const text = value === 0 ? "0" : plain(Math.abs(shown(value) / scale), decimals);
      if (i === 0) return value === 0 ? "0" : plain(shown(value) / scale, decimals);
      return `${shown(value) < 0 ? "\u2212" : "+"} ${text}`;
    });
    this.equation.textContent = `${parts.join(" ")} = ${plain(shown(result) / scale, decimals)} ${unit}`;
    this.exactness.textContent = this.exactnessOf(stored, gap, explained);
    this.exactness.classList.toggle("warning", !explained);
  }

  exactnessOf(stored, gap, explained) {
    const { unit, method } = this.report;
    const kept = stored.exact
      ? "Patch values of this class are kept as they were computed (float32)."
      : `Patch values of this class are kept to \u00b1 ${brief(stored.error)} ${unit} in this file; the sums and the ${unit} are not rounded.`;
    if (this.store.image.claim === "none") {
      return `${method} does not claim that its values add up to anything; this is their sum. ${kept}`;
    }
    const agree = explained
      ? `Sum and ${this.store.image.claim === "total" ? "total" : unit} differ by ${brief(gap)}, which is rounding.`
      : `Sum and ${this.store.image.claim === "total" ? "total" : unit} differ by ${brief(gap)} ${unit}: more than rounding.`;
    return `${agree} ${kept}`;
  }

  draw(stored, terms, result, decimals) {
    let reached = 0;
    const spans = terms.map((term) => {
      const from = reached;
      reached += term.value;
      return { ...term, from, to: reached };
    });
    const ends = [0, result, ...spans.flatMap(({ from, to }) => [from, to])];
    const low = Math.min(...ends);
    const range = Math.max(...ends) - low || 1;
    const x = (value) => ((value - low) / range) * LENGTH;
    this.segments = new Map();
    const rows = spans.map((span, i) => this.row(span, x, stored, decimals, i > 0));
    const name = { logit: `= ${this.report.unit}`, total: "= total", none: "= sum" }[this.store.image.claim];
    const last = { name, part: "result", from: 0, to: result, value: result };
    this.body.replaceChildren(...rows, this.row(last, x, stored, decimals, true, reached));
  }

  row(span, x, stored, decimals, follows, joins = span.from) {
    const svg = shape("svg", { viewBox: `0 0 ${LENGTH} 20`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const line = (at, kind) => shape("line", { x1: at, x2: at, y1: 0, y2: 20, class: kind });
    svg.append(line(x(0), "zero"));
    if (follows) svg.append(line(x(joins), "join"));
    if (span.part !== "result") svg.append(line(x(span.to), "join"));
    const signs = { for: 1, against: -1 };
    if (span.part in signs) svg.append(...this.patches(span, signs[span.part], x, stored.values));
    else svg.append(this.block(x(span.from), x(span.to), span.part));
    const result = span.part === "result";
    const sized = result || !follows ? plain : signed;
    const number = span.value === 0 ? "0" : sized(span.value, decimals);
    return element(
      "tr", { class: span.part }, element("th", { scope: "row" }, span.name),
      element("td", { class: "bar" }, svg), element("td", { class: "number" }, number),
    );
  }

  block(from, to, part) {
    return shape("rect", {
      x: Math.min(from, to), width: Math.max(Math.abs(to - from), 0.5), y: 3, height: 14, class: part,
    });
  }

  // One block a patch, the largest first; those too small to see are one block.
  patches(span, sign, x, values) {
    const order = Array.from(values.keys()).filter((i) => values[i] * sign > 0);
    order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
    const sum = order.reduce((total, i) => total + values[i], 0);
    const stretch = sum ? span.value / sum : 0;
    const blocks = [];
    let from = span.from;
    for (const index of order) {
      const to = from + values[index] * stretch;
      if (Math.abs(x(to) - x(from)) < 1.5) break;
      // Lines between blocks would cover narrow ones.
      const width = Math.abs(x(to) - x(from)) < 8 ? "narrow" : "wide";
      const block = this.block(x(from), x(to), `${span.part} patch ${width}`);
      block.addEventListener("pointerenter", () => this.onPoint(index));
      block.addEventListener("pointerleave", () => this.onPoint(null));
      this.segments.set(index, block);
      blocks.push(block);
      from = to;
    }
    if (Math.abs(span.to - from) > 1e-9 * Math.abs(span.value)) {
      blocks.push(this.block(x(from), x(span.to), `${span.part} small`));
    }
    return blocks;
  }

  mark(index) {
    for (const [patch, block] of this.segments) block.classList.toggle("marked", patch === index);
  }
}

