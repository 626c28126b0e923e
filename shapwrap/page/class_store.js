// The values of one image, class by class.

class ClassStore {
  constructor(report, image) {
    this.report = report;
    this.image = image;
    this.patches = report.grid[0] * report.grid[1];
    this.logits = decodeFloats(image.logits);
    this.order = Array.from(this.logits.keys()).sort((a, b) => this.logits[b] - this.logits[a]);
    this.rank = new Int32Array(this.order.length);
    this.order.forEach((k, place) => { this.rank[k] = place + 1; });
    this.exactValues = decodeFloats(image.exact.values);
    this.baselines = typeof report.baseline === "string" ? decodeFloats(report.baseline) : null;
  }

  has(k) {
    return this.image.rest !== null || this.image.exact.classes.includes(k);
  }

  name(k) {
    return this.report.classNames ? this.report.classNames[k] : `class ${k}`;
  }

  baseline(k) {
    return this.baselines ? this.baselines[k] : this.report.baseline;
  }

  // Values, their sums, and the largest error that storing them has made.
  async of(k) {
    const row = this.image.exact.classes.indexOf(k);
    if (row >= 0) {
      const values = this.exactValues.subarray(row * this.patches, (row + 1) * this.patches);
      let positive = 0;
      let negative = 0;
      for (const value of values) {
        if (value > 0) positive += value;
        else negative += value;
      }
      return { k, values, positive, negative, error: 0, exact: true };
    }
    const rest = await this.rest();
    const counts = rest.counts.subarray(k * this.patches, (k + 1) * this.patches);
    const values = Float64Array.from(counts, (count) => count * rest.steps[k]);
    return {
      k,
      values,
      positive: rest.positive[k],
      negative: rest.negative[k],
      error: rest.steps[k] / 2,
      exact: false,
    };
  }

  // Inflated when a class needs it first.
  rest() {
    this.opened ??= (async () => {
      const { rest } = this.image;
      return {
        counts: await inflate(rest.counts),
        steps: decodeFloats(rest.steps),
        positive: decodeFloats(rest.positive),
        negative: decodeFloats(rest.negative),
      };
    })();
    return this.opened;
  }
}

// Decimals of a patch's value: four digits of the largest, fewer where storing kept fewer.
const valueDecimals = (stored) => {
  let largest = 0;
  for (const value of stored.values) largest = Math.max(largest, Math.abs(value));
  const wanted = decimalsOf(largest, 4);
  return stored.exact ? wanted : Math.min(wanted, decimalsFor(2 * stored.error));
};

const shownValue = (stored, index, decimals) => {
  const text = signed(stored.values[index], decimals);
  return stored.exact ? text : `${text} \u00b1 ${brief(stored.error)}`;
};

