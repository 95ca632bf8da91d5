"use strict";
(() => {
  const read = (name) => JSON.parse(document.getElementById(name).textContent);
  const page = read("data");
  const table = page.table;
  const steps = table.step;
  const unit = page.unit;
  const rows = steps.map((_, i) => Object.fromEntries(Object.entries(table).map(([name, column]) => [name, column[i]])));
  const views = new Map();
  const quiet = () => getComputedStyle(document.documentElement).getPropertyValue("--quiet").trim();
  const state = { picked: 0, low: 0, high: 1, near: -1, ink: quiet() };
  const first = steps[0], last = steps[steps.length - 1];
  const room = Math.max((last - first) * 0.02, 0.5);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);

  const shown = (v) => {
    if (v === null || v === undefined || v === "") return "–";
    if (typeof v !== "number") return String(v);
    if (Number.isInteger(v) && Math.abs(v) < 1e9) return String(v);
    return (Math.abs(v) < 1e-3 && v !== 0) || Math.abs(v) >= 1e7 ? v.toExponential(2).replace("+", "") : String(Number(v.toPrecision(4)));
  };
  const nearest = (list, wanted) => list.reduce((best, s, i) => Math.abs(s - wanted) < Math.abs(list[best] - wanted) ? i : best, 0);
  const tell = (lines, event) => {
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
  };
  const onScreen = (name) => {
    const box = document.getElementById(`chart-${name}`).getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  };
  const signals = (values, where = () => true) => {
    for (const [name, view] of views) {
      if (!where(name)) continue;
      const known = view.getState().signals;
      for (const [signal, v] of Object.entries(values)) if (signal in known) view.signal(signal, v);
      view.runAsync();
    }
  };

  const point = (hover) => {
    if (hover === state.hover) return;
    state.hover = hover;
    signals({ hover }, hover < first ? undefined : onScreen);
  };

  const slider = document.getElementById("step");
  const label = document.getElementById("step-label");
  const cells = [...document.querySelectorAll(".numbers [data-column]")];
  const pick = (place) => {
    const i = Math.max(0, Math.min(steps.length - 1, place));
    state.picked = steps[i];
    slider.value = String(i);
    const said = `${unit} ${steps[i]}`;
    slider.setAttribute("aria-valuetext", said);
    label.textContent = said;
    for (const cell of cells) cell.textContent = shown((table[cell.dataset.column] || [])[i]);
    for (const row of document.querySelectorAll("#checkpoints tbody tr")) {
      if (row.cells[0].textContent === String(steps[i])) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    const cloud = page.cloud.steps;
    const near = state.near = cloud.length ? cloud[nearest(cloud, steps[i])] : -1;
    const where = document.getElementById("cloud-step");
    if (where) where.textContent = `${unit} ${near}`;
    signals({ picked: state.picked, near });
  };
  const zoom = (low, high) => {
    state.low = low;
    state.high = high;
    signals({ low, high });
    document.getElementById("unzoom").disabled = low <= first - room && high >= last + room;
  };
  const reset = () => zoom(first - room, last + room);

  const at = (view, element, event) => {
    const drawn = element.querySelector("svg, canvas").getBoundingClientRect();
    return view.scale("x").invert(event.clientX - drawn.left - view.origin()[0]);
  };
  const listen = (view, element, columns) => {
    let from = null;
    element.addEventListener("pointermove", (event) => {
      const i = nearest(steps, at(view, element, event));
      point(steps[i]);
      if (columns) tell([`${unit} ${steps[i]}`, ...columns.map(([name, said]) => `${said}: ${shown((table[name] || [])[i])}`)], event);
    });
    element.addEventListener("pointerleave", () => {
      tip.hidden = true;
      point(first - 10 * room);
    });
    element.addEventListener("pointerdown", (event) => {
      from = event.pointerType === "mouse" ? [event.clientX, at(view, element, event)] : null;
    });
    element.addEventListener("pointerup", (event) => {
      const to = at(view, element, event);
      if (from && Math.abs(event.clientX - from[0]) > 12) zoom(Math.min(from[1], to), Math.max(from[1], to));
      else pick(nearest(steps, to));
      from = null;
    });
    element.addEventListener("dblclick", reset);
  };
  const tooltip = (handler, event, item, content) => {
    if (!content || typeof content !== "object" || !content.said) { tip.hidden = true; return; }
    tell(content.said.split("\n"), event);
  };

  const draw = async (name, spec, options) => {
    const element = document.getElementById(`chart-${name}`);
    if (!element) return null;
    const ends = { picked: state.picked, hover: first - 10 * room, low: state.low, high: state.high, near: state.near, ink: state.ink };
    const params = spec.params.map((param) => ({ ...param, value: ends[param.name] }));
    const view = await drawInside(element, { ...spec, params }, options.data, {
      renderer: options.renderer || "svg", tooltip: options.tooltip ? tooltip : false,
    });
    const old = views.get(name);
    views.set(name, view);
    if (old) old.finalize();
    element.dataset.drawn = "true";
    return [view, element];
  };

  const unpack = (map) => {
    const [low, high, , , text] = map;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const codes = new DataView(bytes.buffer);
    return (i) => {
      const code = codes.getUint16(2 * i, true);
      return code === 65535 ? null : low + (high - low) * (code / 65534);
    };
  };
  const drawColumn = async (column) => {
    const mapped = page.cells, known = mapped.maps[column], at = mapped.steps;
    const chosen = steps.map((step, i) => ({ step, "v.low": (table[`${column}.low`] || [])[i], "v.mid": (table[`${column}.mid`] || [])[i], "v.high": (table[`${column}.high`] || [])[i] }));
    const line = await draw("column", page.specs.column, { data: { chosen } });
    if (line) listen(line[0], fresh(line[1]), [[`${column}.low`, "lowest tenth"], [`${column}.mid`, "median"], [`${column}.high`, "highest tenth"]]);
    document.getElementById("column-meaning").textContent = page.meanings[column] || "";
    const told = chosen.filter((row) => typeof row["v.mid"] === "number");
    const ends = [told[0], told[told.length - 1]].filter(Boolean).map((row) => `${shown(row["v.mid"])} at ${unit} ${row.step}`);
    document.getElementById("chart-column").setAttribute("aria-label", `${column}, median over modules: ${ends.join(", ")}.`);
    if (!known) return;
    const value = unpack(known);
    const spans = at.map((s, i) => [i ? (at[i - 1] + s) / 2 : s - room, i < at.length - 1 ? (s + at[i + 1]) / 2 : s + room]);
    const cellRows = [];
    mapped.rows.forEach(([, name, many], row) => at.forEach((step, i) => {
      const v = value(row * at.length + i);
      if (v === null) return;
      const what = many > 1 ? `${name} (mean of ${many} modules)` : name;
      cellRows.push({ row, below: row + 1.1, from: spans[i][0], to: spans[i][1] + (spans[i][1] - spans[i][0]) / 10, v, said: `${what}\n${unit} ${step}\n${column}: ${shown(v)}` });
    }));
    const spec = structuredClone(page.specs.map);
    let [low, high] = [known[2], known[3]];
    if (!(low < high)) { low -= Math.abs(low) / 2 || 0.5; high += Math.abs(high) / 2 || 0.5; }
    spec.layer[0].encoding.color.scale.domain = [low, high];
    const labels = mapped.rows.map(([text], row) => ({ row, label: text })).filter((entry) => entry.label);
    const apart = Math.ceil(12 / (spec.height / mapped.rows.length));
    let previous = -apart;
    const spaced = labels.filter((entry) => entry.row - previous >= apart && ((previous = entry.row), true));
    const drawn = await draw("map", spec, { renderer: "canvas", tooltip: true, data: { cells: cellRows, labels: spaced } });
    if (drawn) listen(drawn[0], fresh(drawn[1]), null);
  };
  // a chart that is drawn again must not keep the listeners of its last drawing
  const listening = new Map();
  const fresh = (element) => {
    if (listening.has(element)) listening.get(element).abort();
    const control = new AbortController();
    listening.set(element, control);
    return new Proxy(element, { get: (target, key) => key === "addEventListener"
      ? (name, action) => target.addEventListener(name, action, { signal: control.signal })
      : typeof target[key] === "function" ? target[key].bind(target) : target[key] });
  };

  const start = async () => {
    if (!steps.length) return;
    slider.max = String(steps.length - 1);
    state.low = first - room;
    state.high = last + room;
    pick(nearest(steps, page.start ?? last));
    for (const chart of page.charts) {
      const drawn = await draw(chart.name, chart.spec, { data: { table: rows } });
      if (drawn) listen(drawn[0], drawn[1], chart.columns);
    }
    const points = page.cloud.points.map(([step, module, x, y]) => ({ step, x, y,
      said: `${page.cloud.modules[module]}\n${unit} ${step}\ndirection ${shown(x)}, magnitude ${shown(y)}` }));
    if (points.length) await draw("cloud", page.specs.cloud, { tooltip: true, data: { cloud: points } });
    const choice = document.getElementById("column");
    if (choice) {
      choice.addEventListener("change", () => drawColumn(choice.value));
      await drawColumn(choice.value);
    }
    pick(nearest(steps, state.picked));
    document.body.dataset.ready = "true";
  };
  slider.addEventListener("input", () => pick(Number(slider.value)));
  document.getElementById("unzoom").addEventListener("click", reset);
  document.getElementById("zoom").addEventListener("click", () => {
    const span = (state.high - state.low) / 4;
    zoom(state.picked - span, state.picked + span);
  });
  for (const button of document.querySelectorAll("button[data-step]")) {
    button.addEventListener("click", () => pick(nearest(steps, Number(button.dataset.step))));
  }
  // a canvas knows no CSS: it is told the colour of the theme, and of paper
  const paint = (ink) => {
    state.ink = ink;
    signals({ ink });
  };
  new MutationObserver(() => paint(quiet())).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(quiet()));
  addEventListener("beforeprint", () => paint("#444"));
  addEventListener("afterprint", () => paint(quiet()));
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (tip.hidden) reset();
    tip.hidden = true;
  });
  start();
})();
