// The page: its controls, and one card an image.

const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

const summary = () => {
  const [rows, columns] = report.grid;
  const classes = report.allClasses ? `all ${grouped(report.numClasses)} classes` : "one class an image";
  const parts = [
    `${grouped(report.images.length)} ${report.images.length === 1 ? "image" : "images"}`,
    `${rows} \u00d7 ${columns} patches`, classes,
    report.method === "shapley" ? "the model's own patch values" : `method: ${report.method}`,
  ];
  if (report.contrast) parts.push("compared with the mean of all classes");
  if (report.audit && report.audit.skill !== null) parts.push(`skill of all images ${plain(report.audit.skill, 3)}`);
  return `${parts.join(" \u00b7 ")}.`;
};

const reading = () => {
  const { unit } = report;
  const paragraphs = [
    `Every patch of a picture has a value for every class, in ${unit}: red patches speak for the class, blue ones against it, and pale ones say little.`,
  ];
  if (report.images.every((image) => image.claim === "logit")) {
    paragraphs.push(
      `The values add up to the class's ${unit}, above the baseline, which is what the model says when it sees no patch at all. The bars below each picture show this sum.`,
    );
  }
  if (report.contrast) {
    paragraphs.push("The mean over classes was taken off every value: a red patch speaks for this class more than for the others.");
  }
  paragraphs.push(
    "A value says what a patch contributes to the model's answer. It does not say that the answer is right, nor why the patch matters.",
    "Skill is 1 where the values predict exactly what the model says when patches are hidden, and 0 where they do so no better than spreading the answer evenly over all patches. The residual is the mean squared error of that prediction.",
  );
  return paragraphs.map((text) => element("p", {}, text));
};

const cards = [];

const drawAll = () => {
  if (cards.some((card) => card.stored === undefined)) return;
  const part = Number(byId("range").value);
  const common = Math.max(...cards.map((card) => card.largest()));
  for (const card of cards) card.draw(part * (byId("shared").checked ? common : card.largest()), part < 1);
  document.body.dataset.ready = "yes";
};

const setTheme = (dark) => {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
};

document.title = report.title;
byId("title").textContent = report.title;
byId("summary").textContent = summary();
byId("reading").append(...reading());
byId("footer").textContent = `shapwrap ${report.version}. This file is complete: it loads nothing from anywhere.`;

const systemDark = matchMedia("(prefers-color-scheme: dark)");
let dark = systemDark.matches;
byId("theme").setAttribute("aria-pressed", String(dark));
byId("theme").addEventListener("click", () => { dark = !dark; setTheme(dark); });
systemDark.addEventListener("change", () => { dark = systemDark.matches; setTheme(dark); });

byId("opacity").addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--map-opacity", event.target.value / 100);
  byId("opacity-shown").textContent = `${event.target.value} %`;
});
byId("smooth").addEventListener("change", (event) => document.body.classList.toggle("smooth", event.target.checked));
byId("range").addEventListener("change", drawAll);
byId("shared").addEventListener("change", drawAll);
if (report.images.length === 1) byId("shared").closest("label").hidden = true;

const everywhere = (k) => cards.forEach((card) => card.pick(k));
report.images.forEach((image, number) => {
  const options = { onChange: drawAll };
  if (report.allClasses && report.images.length > 1) options.onPickEverywhere = everywhere;
  cards.push(new ImageCard(report, image, number + 1, options));
});
byId("cards").append(...cards.map((card) => card.root));
cards.forEach((card) => card.pick(card.image.target));
