// One image: its maps, its classes, its sum, and how far to trust it.

class ImageCard {
  constructor(report, image, number, { onChange, onPickEverywhere }) {
    this.report = report;
    this.image = image;
    this.onChange = onChange;
    this.store = new ClassStore(report, image);
    const onPoint = (index) => this.read(index ?? this.map.chosen);
    const onWalk = (index) => { this.map.chosen = index; this.read(index); };
    this.map = new PatchMap(report, image, { onPoint, onWalk });
    // Spoken while walked through by keyboard, silent under a moving pointer.
    this.readout = element("output", { class: "readout", "aria-live": "off" });
    this.map.map.addEventListener("focus", () => this.readout.setAttribute("aria-live", "polite"));
    this.map.map.addEventListener("blur", () => this.readout.setAttribute("aria-live", "off"));
    this.legend = new Legend(report.unit);
    this.bar = new SumBar(report, this.store, { onPoint });
    this.table = new ValueTable(report);
    this.heading = element("p", { class: "about" });
    const onPick = (k) => this.pick(k);
    this.picker = new ClassPicker(this.store, number, { onPick, onPickEverywhere });
    this.root = element(
      "article", { class: "card", "aria-labelledby": `caption-${number}` },
      element("header", {}, element("h2", { id: `caption-${number}` }, image.caption), this.heading),
      element("div", { class: "look" }, this.map.root, this.readout, this.legend.root),
      this.picker.root,
      this.bar.root, this.trust(), this.table.root,
    );
  }

  trust() {
    const { skill, residual, trust } = this.image;
    const figures = element("dl");
    const add = (name, text) => figures.append(element("div", {}, element("dt", {}, name), element("dd", {}, text)));
    if (skill !== null) add("skill", plain(skill, 3));
    if (residual !== null) add("residual", `${brief(residual)} ${this.report.unit}\u00b2`);
    const titles = { unmeasured: "Not measured", low: "Low skill", fair: "Fair skill", high: "High skill" };
    return element(
      "section", { class: `trust ${trust.level}` },
      element("h3", {}, "How far to trust it"),
      element("p", {}, element("strong", { class: "level" }, titles[trust.level]), " ", trust.text), figures,
    );
  }

  async pick(k) {
    if (!this.store.has(k)) return;
    let stored;
    this.asked = k;
    try {
      stored = await this.store.of(k);
    } catch (error) {
      this.heading.textContent = `The values of ${this.store.name(k)} cannot be read: ${error}`;
      return;
    }
    // A later choice may have been quicker.
    if (this.asked !== k) return;
    this.stored = stored;
    const rank = `${this.report.unit} ${plain(this.store.logits[k], decimalsOf(Math.abs(this.store.logits[k]), 4))}`;
    const place = this.store.rank[k] === 1 ? "the highest" : `number ${grouped(this.store.rank[k])}`;
    this.heading.replaceChildren(
      element("strong", {}, this.store.name(k)),
      `: ${rank}, ${place} of ${grouped(this.store.logits.length)}`,
    );
    this.picker.show(k);
    this.bar.show(stored);
    this.table.show(stored, this.store.name(k));
    this.onChange();
    this.read(this.map.chosen);
  }

  largest() {
    return this.stored.values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  }

  draw(limit, clipped) {
    this.map.draw(this.stored.values, limit);
    this.legend.set(limit, clipped);
  }

  // What one patch says, under the pointer or the cursor.
  read(index) {
    this.map.mark(index);
    this.bar.mark(index);
    if (index === null || index === undefined) {
      this.readout.textContent = "Point at a patch, or press Tab and the arrow keys, to read its value.";
      this.readout.classList.add("hint");
      return;
    }
    this.readout.classList.remove("hint");
    const { columns } = this.map;
    const { stored } = this;
    const value = shownValue(stored, index, valueDecimals(stored));
    let rank = "";
    if (stored.exact) {
      const size = Math.abs(stored.values[index]);
      const place = 1 + stored.values.reduce((before, other) => before + (Math.abs(other) > size), 0);
      rank = `, number ${place} of ${stored.values.length} by size`;
    }
    this.readout.replaceChildren(
      `Row ${Math.floor(index / columns) + 1}, column ${(index % columns) + 1}: `,
      element("strong", {}, `${value} ${this.report.unit}`), ` for ${this.store.name(stored.k)}${rank}`,
    );
  }
}

