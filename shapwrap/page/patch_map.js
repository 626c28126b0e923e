// The picture, and the map of patches over it: drawn, pointed at, walked through with arrow keys.

class PatchMap {
  constructor(report, image, { onPoint, onWalk }) {
    [this.rows, this.columns] = report.grid;
    this.onPoint = onPoint;
    this.canvas = element("canvas", { width: this.columns, height: this.rows, "aria-hidden": "true" });
    const heights = report.covered[0] / report.imageSize[0];
    const widths = report.covered[1] / report.imageSize[1];
    this.extent = [heights, widths];
    this.canvas.style.height = `${100 * heights}%`;
    this.canvas.style.width = `${100 * widths}%`;
    this.frames = [];
    this.map = this.stage(image, "map", {
      tabindex: "0",
      role: "application",
      "aria-roledescription": "map of patches",
      "aria-label": `Patch values of ${image.caption}, ${this.rows} rows and ${this.columns} columns. `
        + "Arrow keys read one patch after the other, Home and End go to the ends of a row, Escape leaves.",
    });
    this.map.querySelector("img").after(this.canvas);
    this.map.addEventListener("keydown", (event) => {
      const to = this.step(event);
      if (to === undefined) return;
      event.preventDefault();
      onWalk(to);
    });
    this.map.addEventListener("focus", () => onWalk(this.chosen ?? this.strongest()));
    this.root = element(
      "div", { class: "maps" },
      element("figure", {}, this.stage(image, "picture", {}), element("figcaption", {}, "Picture")),
      element("figure", {}, this.map, element("figcaption", {}, "Patch values")),
    );
    this.chosen = null;
  }

  stage(image, kind, attributes) {
    const frame = element("div", { class: "patch-frame", hidden: true });
    this.frames.push(frame);
    const alt = kind === "picture" ? image.caption : "";
    const stage = element(
      "div", { class: `stage ${kind}`, ...attributes }, element("img", { src: image.picture, alt }), frame,
    );
    stage.addEventListener("pointermove", (event) => this.onPoint(this.at(stage, event)));
    stage.addEventListener("pointerleave", () => this.onPoint(null));
    // Touch has no pointer that rests, and a tap must stay where it was.
    stage.addEventListener("pointerdown", (event) => { this.chosen = this.at(stage, event) ?? this.chosen; });
    return stage;
  }

  at(stage, event) {
    const box = stage.querySelector("img").getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height / this.extent[0]) * this.rows);
    const column = Math.floor(((event.clientX - box.left) / box.width / this.extent[1]) * this.columns);
    const inside = row >= 0 && row < this.rows && column >= 0 && column < this.columns;
    return inside ? row * this.columns + column : null;
  }

  // Where a key leads; undefined for keys that mean nothing here.
  step(event) {
    if (event.altKey || event.metaKey) return undefined;
    if (event.key === "Escape") return null;
    const from = this.chosen ?? this.strongest();
    const row = Math.floor(from / this.columns);
    const column = from % this.columns;
    const ends = event.ctrlKey ? [0, this.rows * this.columns - 1] : [row * this.columns, (row + 1) * this.columns - 1];
    switch (event.key) {
      case "ArrowLeft": return column > 0 ? from - 1 : from;
      case "ArrowRight": return column < this.columns - 1 ? from + 1 : from;
      case "ArrowUp": return row > 0 ? from - this.columns : from;
      case "ArrowDown": return row < this.rows - 1 ? from + this.columns : from;
      case "Home": return ends[0];
      case "End": return ends[1];
      default: return undefined;
    }
  }

  strongest() {
    let best = 0;
    this.values.forEach((value, i) => { if (Math.abs(value) > Math.abs(this.values[best])) best = i; });
    return best;
  }

  draw(values, limit) {
    this.values = values;
    const drawn = this.canvas.getContext("2d");
    const pixels = drawn.createImageData(this.columns, this.rows);
    values.forEach((value, i) => pixels.data.set([...colorOf(limit > 0 ? value / limit : 0), 255], 4 * i));
    drawn.putImageData(pixels, 0, 0);
  }

  mark(index) {
    for (const frame of this.frames) {
      frame.hidden = index === null;
      if (index === null) continue;
      const [heights, widths] = this.extent;
      frame.style.top = `${((100 * heights) / this.rows) * Math.floor(index / this.columns)}%`;
      frame.style.left = `${((100 * widths) / this.columns) * (index % this.columns)}%`;
      frame.style.height = `${(100 * heights) / this.rows}%`;
      frame.style.width = `${(100 * widths) / this.columns}%`;
    }
  }
}

