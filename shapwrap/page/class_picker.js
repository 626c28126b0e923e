// Which class is shown: the likeliest ones in a list, all others by search.

const TOP = 10;
const FOUND = 40;

class ClassPicker {
  constructor(store, id, { onPick, onPickEverywhere }) {
    this.store = store;
    this.onPick = onPick;
    this.list = element("div", { class: "classes", role: "radiogroup", "aria-label": "Class" });
    this.list.addEventListener("keydown", (event) => this.walkList(event));
    this.root = element("section", { class: "picker" }, element("h3", {}, "Class"), this.list);
    this.searchable = store.image.rest !== null || store.image.exact.classes.length > 1;
    if (this.searchable) this.addSearch(id);
    else {
      this.root.append(element(
        "p", { class: "only-one" },
        "This page holds the values of one class. Explained with all_classes=True it holds all of them.",
      ));
    }
    if (onPickEverywhere) {
      this.root.append(element(
        "button", { type: "button", class: "everywhere", onclick: () => onPickEverywhere(this.picked) },
        "Show this class for all images",
      ));
    }
  }

  // Classes are radio buttons: one tab stop, arrow keys choose.
  show(picked) {
    this.picked = picked;
    const { store } = this;
    const listed = store.order.slice(0, TOP);
    if (!listed.includes(picked)) listed.push(picked);
    const highest = store.logits[store.order[0]];
    const lowest = Math.min(0, store.logits[listed[listed.length - 1]]);
    const decimals = decimalsOf(Math.max(Math.abs(highest), Math.abs(lowest)), 3);
    const focused = this.list.contains(document.activeElement);
    this.list.replaceChildren(...listed.map((k) => {
      const chosen = k === picked;
      const share = (store.logits[k] - lowest) / (highest - lowest || 1);
      const meter = element("span", { class: "meter", "aria-hidden": "true" });
      meter.style.width = `${100 * clamp(share, 0, 1)}%`;
      return element(
        "button", {
          type: "button", role: "radio", "aria-checked": String(chosen), tabindex: chosen ? "0" : "-1",
          disabled: !store.has(k), "data-class": k, onclick: () => this.onPick(k),
        },
        meter, element("span", { class: "rank" }, String(store.rank[k])),
        element("span", { class: "name" }, store.name(k)),
        element("span", { class: "logit" }, plain(store.logits[k], decimals)),
      );
    }));
    if (focused) this.list.querySelector('[aria-checked="true"]').focus();
  }

  walkList(event) {
    const steps = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const buttons = [...this.list.querySelectorAll("button:enabled")];
    const place = buttons.indexOf(document.activeElement) + steps[event.key];
    buttons[(place + buttons.length) % buttons.length].click();
  }

  addSearch(id) {
    const total = grouped(this.store.logits.length);
    this.input = element("input", {
      type: "search", id: `search-${id}`, autocomplete: "off", spellcheck: "false",
      placeholder: "Name or number", oninput: () => this.search(),
    });
    this.found = element("div", { class: "found", role: "group", "aria-label": "Classes found", hidden: true });
    this.count = element("p", { class: "count", role: "status" });
    const box = element(
      "div", { class: "search" },
      element("label", { for: `search-${id}` }, `Search all ${total} classes`), this.input, this.count, this.found,
    );
    box.addEventListener("keydown", (event) => this.walkFound(event));
    this.root.append(box);
  }

  matches(text) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return [];
    const { store } = this;
    return store.order.filter((k) => String(k) === wanted || store.name(k).toLowerCase().includes(wanted));
  }

  search() {
    const matches = this.matches(this.input.value);
    const some = matches.slice(0, FOUND);
    this.found.replaceChildren(...some.map((k) => element(
      "button", { type: "button", tabindex: "-1", "data-class": k, onclick: () => this.take(k) },
      element("span", { class: "rank" }, String(this.store.rank[k])),
      element("span", { class: "name" }, this.store.name(k)),
      element("span", { class: "logit" }, plain(this.store.logits[k], 2)),
    )));
    this.found.hidden = some.length === 0;
    const asked = this.input.value.trim() !== "";
    const cut = matches.length > FOUND ? `, the first ${FOUND} by ${this.store.report.unit} shown` : "";
    this.count.textContent = asked ? `${grouped(matches.length)} ${matches.length === 1 ? "class" : "classes"}${cut}` : "";
  }

  take(k) {
    this.clear();
    this.input.focus();
    this.onPick(k);
  }

  clear() {
    this.input.value = "";
    this.search();
  }

  walkFound(event) {
    const buttons = [...this.found.querySelectorAll("button")];
    const place = buttons.indexOf(document.activeElement);
    if (event.key === "Escape") this.clear();
    else if (event.key === "Enter" && place < 0 && buttons.length) buttons[0].click();
    else if (event.key === "ArrowDown" && place < buttons.length - 1) buttons[place + 1].focus();
    else if (event.key === "ArrowUp" && place >= 0) (place ? buttons[place - 1] : this.input).focus();
    else return;
    event.preventDefault();
    if (event.key === "Escape") this.input.focus();
  }
}

