"use strict";
(() => {
  const root = document.documentElement;
  const toggle = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("lora-forensics-theme");
      localStorage.setItem("lora-forensics-theme", value);
    } catch { /* a file: page may have no storage */ }
    return null;
  };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => toggle && toggle.setAttribute("aria-pressed", String(dark()));
  const stored = remembered();
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
  if (toggle) {
    toggle.hidden = false;
    toggle.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      remembered(root.dataset.theme);
      show();
    });
  }
  system.addEventListener("change", show);
  show();

  const value = (cell) => {
    const text = cell.textContent.trim();
    const number = text === "" ? NaN : Number(text);
    return Number.isNaN(number) ? text : number;
  };
  const order = (a, b) => {
    if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row) => [value(row.cells[column]), row]);
        rows.sort((a, b) => {
          const found = order(a[0], b[0]);
          return down && a[0] !== "" && b[0] !== "" ? -found : found;
        });
        table.tBodies[0].append(...rows.map((pair) => pair[1]));
      });
    });
  }
  for (const tools of document.querySelectorAll(".tools[data-for]")) {
    const table = document.getElementById(tools.dataset.for);
    const word = tools.querySelector("input");
    const choices = [...tools.querySelectorAll("select")];
    const said = tools.querySelector("[role=status]");
    const filter = () => {
      let shown = 0;
      const words = word.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        const fits = words.every((w) => text.includes(w)) &&
          choices.every((c) => !c.value || row.cells[Number(c.dataset.column)].textContent === c.value);
        row.hidden = !fits;
        shown += fits ? 1 : 0;
      }
      said.textContent = `${shown} of ${table.tBodies[0].rows.length} shown`;
    };
    tools.hidden = false;
    [word, ...choices].forEach((input) => input.addEventListener("input", filter));
    filter();
  }
})();
