// All values of a class as a table, made when somebody opens it.

class ValueTable {
  constructor(report) {
    this.columns = report.grid[1];
    this.unit = report.unit;
    this.table = element("table");
    this.root = element(
      "details", { class: "values" }, element("summary", {}, "All values as a table"),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Values of all patches" }, this.table),
    );
    this.root.addEventListener("toggle", () => this.fill());
  }

  show(stored, name) {
    this.stored = stored;
    this.name = name;
    this.fill();
  }

  fill() {
    if (!this.root.open) return;
    const { columns, stored } = this;
    const decimals = valueDecimals(stored);
    const numbers = Array.from({ length: columns }, (_, i) => element("th", { scope: "col" }, String(i + 1)));
    const rows = [];
    for (let start = 0; start < stored.values.length; start += columns) {
      const cells = Array.from({ length: columns }, (_, i) => element("td", {}, signed(stored.values[start + i], decimals)));
      rows.push(element("tr", {}, element("th", { scope: "row" }, String(start / columns + 1)), ...cells));
    }
    const error = stored.exact ? "" : `, each \u00b1 ${brief(stored.error)}`;
    this.table.replaceChildren(
      element("caption", {}, `${this.name}, in ${this.unit}${error}; one row of patches a line`),
      element("thead", {}, element("tr", {}, element("td"), ...numbers)), element("tbody", {}, ...rows),
    );
  }
}

