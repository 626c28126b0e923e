// Tables inside "sortable" are sorted by a click on a heading; on every page that Material shows,
// which with instant loading is not a new document.
const makeSortable = () => {
  document.querySelectorAll(".sortable table").forEach((table) => new Tablesort(table));
};
if (typeof document$ === "undefined") {
  document.addEventListener("DOMContentLoaded", makeSortable);
} else {
  document$.subscribe(makeSortable);
}
