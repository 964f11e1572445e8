// Filters, sorting, plots and copying. No library but Vega, and nothing is fetched.
"use strict";

for (const table of document.querySelectorAll("[data-table]")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const form = document.querySelector("[data-filters]");
  const count = document.querySelector("[data-count]");

  function shown(row) {
    const asked = Object.fromEntries(new FormData(form));
    const factor = Number(row.dataset.factor);
    const [low, high] = asked.factor.split("-").map(Number);
    return row.dataset.text.toLowerCase().includes(asked.text.trim().toLowerCase())
      && (!asked.metric || row.dataset.metric === asked.metric)
      && (!asked.factor || (factor > low && factor <= high))
      && (!asked.origin || row.dataset.origin === asked.origin);
  }

  function filter() {
    let left = 0;
    for (const row of rows) left += !(row.hidden = !shown(row));
    count.textContent = left === rows.length ? `${left} entries` : `${left} of ${rows.length} entries`;
  }

  function sort(head) {
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].dataset.value;
    const numeric = rows.every((row) => key(row) !== "" && !isNaN(key(row)));
    const order = (a, b) => numeric ? key(a) - key(b) : key(a).localeCompare(key(b));
    body.append(...[...rows].sort((a, b) => rising ? order(a, b) : order(b, a)));
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  for (const head of table.tHead.rows[0].cells) {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(head));
  }
  filter();
}

const plots = [...document.querySelectorAll("[data-plot]")];
if (plots.length) {
  const font = getComputedStyle(document.body).fontFamily;
  const columns = matchMedia("(max-width: 40rem)").matches ? 2 : 6;
  const chosen = (name) => document.querySelector(`[data-${name}] input:checked`).value;
  const draw = () => {
    for (const plot of plots) {
      const spec = JSON.parse(plot.querySelector("script").textContent)[chosen("axis")];
      const data = [spec, ...spec.layer].map((part) => part.data).filter((part) => part?.values);
      const dense = Math.max(...data.flatMap((part) => part.values.map((row) => row.accuracy)));
      const near = (row) => row.accuracy >= dense - Number(chosen("rows"));
      for (const part of data) part.values = part.values.filter(near);
      spec.config.font = font;
      spec.config.legend.columns = columns;
      vegaEmbed(plot.querySelector(".chart"), spec, { actions: false, renderer: "svg" });
    }
  };
  for (const radio of document.querySelectorAll("[data-axis] input, [data-rows] input")) {
    radio.addEventListener("change", draw);
  }
  draw();
}

for (const box of document.querySelectorAll("[data-copy]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const text = box.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      getSelection().selectAllChildren(box.querySelector("code"));
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  box.append(button);
}
