"use strict";

// Rows of a table by a column: numbers by data-value, text as people order it, empty cells last either way.
function sortBy(header) {
  const table = header.closest("table");
  const column = header.cellIndex;
  const isNumber = header.classList.contains("n");
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = (row) => {
    const cell = row.cells[column];
    const text = isNumber ? cell.dataset.value : cell.textContent.trim();
    if (text === "" || text === "–") return null;
    return isNumber ? Number(text) : text;
  };
  const compare = (a, b) => (isNumber ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const keyed = Array.from(table.tBodies[0].rows, (row) => [key(row), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * compare(a, b);
  });
  table.tBodies[0].append(...keyed.map(([, row]) => row));
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
}

// Solvers chosen in a legend stand out in the charts below it.
function highlight(button) {
  button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
  const charts = button.closest(".charts");
  const chosen = new Set(
    Array.from(charts.querySelectorAll("[aria-pressed=true]"), (pressed) => pressed.dataset.series),
  );
  for (const curve of charts.querySelectorAll(".curve")) {
    curve.classList.toggle("faint", chosen.size > 0 && !chosen.has(curve.dataset.series));
  }
}

for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => highlight(button));
}
