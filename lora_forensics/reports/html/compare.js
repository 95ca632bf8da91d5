"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const runs = page.runs;
  const views = new Map();
  const pinned = new Set();
  const state = { align: page.align, picked: 0, low: 0, high: 1, first: 0, last: 1 };
  let hovered = -1;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  const slider = document.getElementById("place");
  const label = document.getElementById("place-label");
  const only = document.getElementById("only");
  const buttons = [...document.querySelectorAll("button[data-run]")];

  const shown = (v) => {
    if (v === null || v === undefined) return "–";
    if (Number.isInteger(v) && Math.abs(v) < 1e9) return String(v);
    return (Math.abs(v) < 1e-3 && v !== 0) || Math.abs(v) >= 1e7 ? v.toExponential(2).replace("+", "") : String(Number(v.toPrecision(4)));
  };
  const known = (v) => v !== null && v !== undefined;
  // what one chart draws: a row for each run and checkpoint that has a place on this axis and a value
  const rowsOf = (measure) => runs.flatMap((run, at) => {
    const axis = run.course[state.align] || [], values = run.course[measure] || [];
    const rows = [];
    if (only.getAttribute("aria-pressed") === "true" && !pinned.has(at)) return rows;
    axis.forEach((x, i) => {
      if (!known(x) || !known(values[i])) return;
      rows.push({ run: at, x, y: values[i], color: run.color, dash: run.dash, i,
        mark: run.course.place[i] === run.keep ? "kept" : run.course.place[i] === run.turn ? "turning" : "" });
    });
    if (rows.length) rows[rows.length - 1].name = run.letter;
    if (rows.length === 1) rows[0].alone = true; // a line of one point would be nothing
    return rows;
  });
  const data = new Map();

  let waiting = new Map();
  const signals = (values) => {
    if (!waiting.size) requestAnimationFrame(() => {
      const all = waiting;
      waiting = new Map();
      for (const view of views.values()) {
        for (const [name, v] of all) view.signal(name, v);
        view.runAsync();
      }
    });
    for (const [name, v] of Object.entries(values)) waiting.set(name, v);
  };
  const light = () => {
    const lit = new Set(pinned);
    if (hovered >= 0) lit.add(hovered);
    signals({ lit: [...lit] });
    for (const button of buttons) button.setAttribute("aria-pressed", String(pinned.has(Number(button.dataset.run))));
    for (const row of document.querySelectorAll("#values tbody tr, #runs tbody tr")) {
      const cell = row.querySelector("[data-of]");
      if (cell && lit.has(Number(cell.dataset.of))) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    document.getElementById("clear").disabled = only.disabled = !pinned.size;
  };
  const refill = () => {
    for (const chart of page.charts) {
      data.set(chart.name, rowsOf(chart.name));
      const view = views.get(chart.name);
      view.data("table", structuredClone(data.get(chart.name)));
      view.runAsync();
    }
  };
  const alone = (on) => {
    if ((only.getAttribute("aria-pressed") === "true") === on && !on) return;
    only.setAttribute("aria-pressed", String(on));
    refill();
  };
  const toggle = (run) => {
    if (pinned.has(run)) pinned.delete(run);
    else pinned.add(run);
    light();
    alone(pinned.size > 0 && only.getAttribute("aria-pressed") === "true");
  };

  // the checkpoint of a run nearest to a place, unless it lies further away than checkpoints are apart
  const nearest = (run, measure, place) => {
    const axis = run.course[state.align] || [], values = run.course[measure] || [];
    let best = -1;
    axis.forEach((x, i) => {
      if (known(x) && known(values[i]) && (best < 0 || Math.abs(x - place) < Math.abs(axis[best] - place))) best = i;
    });
    return best >= 0 && Math.abs(axis[best] - place) <= run.apart[state.align] ? values[best] : null;
  };
  const pick = (place) => {
    state.picked = Math.max(state.first, Math.min(state.last, place));
    slider.value = String(Math.round(1000 * (state.picked - state.first) / (state.last - state.first || 1)));
    const said = `${state.align} ${shown(state.align === "step" ? Math.round(state.picked) : state.picked)}`;
    slider.setAttribute("aria-valuetext", said);
    label.textContent = said;
    for (const cell of document.querySelectorAll("#values [data-measure]")) {
      cell.textContent = shown(nearest(runs[Number(cell.dataset.run)], cell.dataset.measure, state.picked));
    }
    signals({ picked: state.picked });
  };
  const zoom = (low, high) => {
    state.low = low;
    state.high = high;
    signals({ low, high });
    const room = (state.last - state.first) * 0.02;
    document.getElementById("unzoom").disabled = low <= state.first - room && high >= state.last + 2 * room;
  };
  const reset = () => {
    const room = (state.last - state.first) * 0.02 || 0.5;
    zoom(state.first - room, state.last + 2 * room);
  };
  const nowhere = () => state.first - (state.last - state.first) * 9 - 9;
  const align = async (name) => {
    state.align = name;
    [state.first, state.last] = page.ends[name];
    for (const word of document.querySelectorAll("[data-axis]")) word.textContent = page.axes[name];
    const without = runs.filter((run) => !(run.course[name] || []).some(known)).map((run) => run.letter);
    document.getElementById("without").textContent = without.length ? `Not drawn, no ${name} is known: ${without.join(", ")}.` : "";
    refill();
    reset();
    signals({ hover: nowhere() });
    pick((state.first + state.last) / 2);
    await Promise.all([...views.values()].map((view) => view.runAsync()));
    document.body.dataset.align = name;
  };

  const tell = (lines, event) => {
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 4))}px`;
  };
  const listen = (chart, element) => {
    const where = (event) => {
      const view = views.get(chart.name), drawn = element.querySelector("svg").getBoundingClientRect();
      const [left, top] = view.origin(), room = view.padding();
      return [event.clientX - drawn.left - left - room.left, event.clientY - drawn.top - top - room.top];
    };
    const place = (event) => views.get(chart.name).scale("x").invert(where(event)[0]);
    let from = null, near = null;
    element.addEventListener("pointermove", (event) => {
      const view = views.get(chart.name), x = view.scale("x"), y = view.scale("y"), [across, down] = where(event);
      let best = null, least = 40 * 40;
      for (const row of data.get(chart.name)) {
        const away = (x(row.x) - across) ** 2 + (y(row.y) - down) ** 2;
        if (away < least) [best, least] = [row, away];
      }
      signals({ hover: x.invert(across) });
      near = best;
      const run = best ? best.run : -1;
      if (run !== hovered) {
        hovered = run;
        light();
      }
      if (!best) {
        tip.hidden = true;
        return;
      }
      const course = runs[run].course;
      const axes = ["step", "epoch", "dose"].filter((name) => known((course[name] || [])[best.i]));
      const marks = { kept: "the checkpoint to keep", turning: "turning point" };
      tell([`${runs[run].letter}  ${runs[run].name}`, axes.map((name) => `${name} ${shown(course[name][best.i])}`).join(", "),
        `${chart.title}: ${shown(best.y)}`, ...(best.mark ? [marks[best.mark]] : [])], event);
    });
    element.addEventListener("pointerleave", () => {
      tip.hidden = true;
      near = null;
      hovered = -1;
      light();
      signals({ hover: nowhere() });
    });
    element.addEventListener("pointerdown", (event) => {
      from = event.pointerType === "mouse" ? [event.clientX, place(event)] : null;
    });
    element.addEventListener("pointerup", (event) => {
      const to = place(event);
      if (from && Math.abs(event.clientX - from[0]) > 12) zoom(Math.min(from[1], to), Math.max(from[1], to));
      else pick(near ? near.x : to);
      from = null;
    });
    element.addEventListener("dblclick", reset);
  };

  const start = async () => {
    [state.first, state.last] = page.ends[state.align];
    for (const chart of page.charts) {
      const element = document.getElementById(`chart-${chart.name}`);
      data.set(chart.name, rowsOf(chart.name));
      const params = chart.spec.params.map((param) => ({ ...param, value: param.name === "lit" ? [] : param.value }));
      const table = structuredClone(data.get(chart.name));
      views.set(chart.name, await drawInside(element, { ...chart.spec, params }, { table }));
      listen(chart, element);
    }
    await align(state.align);
    light();
    document.body.dataset.ready = "true";
  };
  slider.addEventListener("input", () => pick(state.first + (state.last - state.first) * Number(slider.value) / 1000));
  for (const radio of document.querySelectorAll("input[name=align]")) radio.addEventListener("change", () => align(radio.value));
  for (const button of buttons) {
    const run = Number(button.dataset.run);
    button.addEventListener("click", () => toggle(run));
    const over = (at) => () => {
      hovered = at;
      light();
    };
    button.addEventListener("pointerenter", over(run));
    button.addEventListener("pointerleave", over(-1));
  }
  document.getElementById("clear").addEventListener("click", () => {
    pinned.clear();
    light();
    alone(false);
  });
  only.addEventListener("click", () => alone(only.getAttribute("aria-pressed") !== "true"));
  document.getElementById("unzoom").addEventListener("click", reset);
  document.getElementById("zoom").addEventListener("click", () => {
    const span = (state.high - state.low) / 4;
    zoom(state.picked - span, state.picked + span);
  });
  start();
})();
