"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (tag, text = "", css = "") => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (css) element.className = css;
    return element;
  };

  // ---------------------------------------------------------------- light and dark
  const button = document.getElementById("theme");
  const stored = (value) => {
    // A file opened from disk may have no storage; the choice then lasts as long as the page.
    try {
      if (value) localStorage.setItem("dphrl-theme", value);
      return localStorage.getItem("dphrl-theme");
    } catch { return null; }
  };
  const chosen = stored();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    stored(root.dataset.theme);
  });

  // ---------------------------------------------------------------- legend
  for (const toggle of all(".legend button")) {
    toggle.addEventListener("click", () => {
      const shown = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", String(shown));
      for (const mark of all(`main svg .s-${toggle.dataset.key}:not(.shown)`)) mark.style.display = shown ? "" : "none";
    });
  }

  // ---------------------------------------------------------------- read-out
  const readout = make("div", "", "readout");
  readout.hidden = true;
  readout.setAttribute("role", "status");
  document.body.append(readout);
  const charts = new Map();

  const parse = (svg) => {
    if (charts.has(svg)) return charts.get(svg);
    const [left, right] = svg.dataset.box.split(",").map(Number);
    const [low, high, kind] = svg.dataset.x.split(",");
    const scale = kind === "log" ? Math.log : (value) => value;
    const from = scale(Number(low)), to = scale(Number(high));
    const place = (x) => left + (scale(x) - from) / (to - from) * (right - left);
    const series = all(".series", svg).map((group) => ({
      group,
      name: group.dataset.name,
      notes: group.dataset.notes ? group.dataset.notes.split("|") : null,
      points: group.dataset.points.split(" ").filter(Boolean).map((text) => text.split(",").map(Number)),
    }));
    const holder = svg.querySelector(".edges");
    const edges = holder ? holder.dataset.edges.split(",").map(Number) : null;
    const parts = all(".part[data-heights]", svg).map((group) => ({
      group, name: group.dataset.name, heights: group.dataset.heights.split(",").map(Number),
    }));
    const stops = edges
      ? edges.slice(1).map((edge, i) => (edge + edges[i]) / 2)
      : [...new Set(series.flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
    const chart = { place, series, edges, parts, stops, at: 0, plane: series.some(({ notes }) => notes) };
    charts.set(svg, chart);
    return chart;
  };

  const colourOf = (group) => getComputedStyle(group).getPropertyValue("--colour");
  const fill = (heading, rows) => {
    const table = document.createElement("table");
    for (const [colour, ...cells] of rows) {
      const row = table.insertRow();
      const dot = make("td", "●");
      dot.style.color = colour;
      row.append(dot, ...cells.map((cell) => make("td", cell)));
    }
    readout.replaceChildren(make("p", heading), table);
  };
  const isShown = ({ group }) => group.style.display !== "none";

  const show = (svg, index) => {
    const chart = parse(svg);
    if (!chart.stops.length) return;
    chart.at = Math.max(0, Math.min(chart.stops.length - 1, index));
    const x = chart.stops[chart.at];
    const label = svg.dataset.xLabel.split(",")[0].split(":")[0];
    if (chart.edges) {
      const [first, last] = [chart.edges[chart.at] + 1, chart.edges[chart.at + 1]];
      fill(`${label} ${first === last ? last : `${first} to ${last}`}`,
        chart.parts.map(({ group, name, heights }) => [colourOf(group), name, String(heights[chart.at])]).reverse());
    } else {
      const rows = [];
      for (const entry of chart.series.filter(isShown)) {
        entry.points.forEach(([px, y, low, high], i) => {
          if (px !== x) return;
          const interval = low === undefined ? "" : `${low} to ${high}`;
          rows.push([colourOf(entry.group), entry.name, ...(entry.notes ? [entry.notes[i]] : []), String(y), interval, y]);
        });
      }
      rows.sort((a, b) => b.at(-1) - a.at(-1));
      fill(`${label} ${x}`, rows.map((row) => row.slice(0, -1)));
    }
    const cursor = svg.querySelector(".cursor");
    const at = chart.place(x);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    readout.hidden = false;
    const box = svg.getBoundingClientRect();
    const pixel = box.width / svg.viewBox.baseVal.width;
    const wide = readout.offsetWidth;
    let left = box.left + at * pixel + 12;
    if (left + wide > root.clientWidth - 4) left = box.left + at * pixel - wide - 12;
    readout.style.left = `${Math.max(4, left) + scrollX}px`;
    readout.style.top = `${box.top + scrollY + 18 * pixel}px`;
  };
  const hide = (svg) => {
    svg.querySelector(".cursor").setAttribute("visibility", "hidden");
    readout.hidden = true;
  };
  for (const svg of all("svg[data-chart]")) {
    // The browser would show <title> as a tooltip over the read-out; its words stay as the label.
    const title = svg.querySelector("title");
    svg.setAttribute("aria-label", title.textContent);
    title.remove();
    svg.addEventListener("pointermove", (event) => {
      const chart = parse(svg);
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      let nearest = 0;
      chart.stops.forEach((x, i) => {
        if (Math.abs(chart.place(x) - at) < Math.abs(chart.place(chart.stops[nearest]) - at)) nearest = i;
      });
      show(svg, nearest);
    });
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("blur", () => hide(svg));
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") hide(svg);
      if (move === undefined) return;
      event.preventDefault();
      const chart = parse(svg);
      show(svg, svg.querySelector(".cursor").getAttribute("visibility") === "hidden" ? chart.at : chart.at + move);
    });
  }

  // ---------------------------------------------------------------- completions
  const holder = document.getElementById("samples-data");
  if (!holder) return;
  const { arms, prompts, rows: packed } = JSON.parse(holder.textContent);
  const names = ["arm", "seed", "step", "prompt", "completion", "score", "status", "detail", "version", "finish"];
  const rows = packed.map((row) => Object.fromEntries(row.map((value, i) => [names[i], value])));
  const severalSeeds = new Set(rows.map((row) => row.seed)).size > 1;
  const form = document.getElementById("browser");
  const more = document.getElementById("more");
  const PAGE = 8;
  let numShown = PAGE;
  const field = (name) => form.elements.namedItem(name);
  const options = (name, entries, everything) => {
    const select = field(name), before = select.value;
    const made = (everything ? [["", everything], ...entries] : entries).map(([value, text]) => new Option(text, value));
    select.replaceChildren(...made);
    if (made.some((option) => option.value === before)) select.value = before;
  };
  const distinct = (values) => [...new Set(values)];
  const plain = (status) => status.replaceAll("_", " ");
  const matches = (row, except = "") => {
    const [dataset, , text] = prompts[row.prompt];
    const wanted = field("text").value.toLowerCase();
    return (except === "dataset" || !field("dataset").value || dataset === field("dataset").value)
      && (except === "step" || !field("step").value || row.step === Number(field("step").value))
      && (except === "prompt" || !field("prompt").value || row.prompt === Number(field("prompt").value))
      && (!field("arm").value || row.arm === Number(field("arm").value))
      && (!field("status").value || row.status === field("status").value)
      && (!wanted || text.toLowerCase().includes(wanted) || row.completion.toLowerCase().includes(wanted));
  };
  const card = (row) => {
    const box = make("article", "", `answer c${row.arm % 8}`);
    const head = make("p");
    head.append(make("b", arms[row.arm] + (severalSeeds ? `, seed ${row.seed}` : "")), " · ", make("b", plain(row.status)));
    const facts = [`score ${row.score ?? "none"}`, `step ${row.step}`, `policy version ${row.version ?? "?"}`];
    if (row.finish && row.finish !== "stop") facts.push(`ended by ${row.finish}`);
    head.append(` · ${facts.join(" · ")}`);
    box.append(head, make("pre", row.completion));
    if (row.detail) box.append(make("p", row.detail));
    return box;
  };
  const update = () => {
    const listed = distinct(rows.filter((row) => matches(row, "prompt")).map((row) => row.prompt));
    options("prompt", listed.map((i) => [String(i), `${prompts[i][1]}: ${prompts[i][2].slice(0, 60)}`]), `all ${listed.length}`);
    const found = rows.filter((row) => matches(row));
    const groups = new Map();
    for (const row of found) groups.set(row.prompt, [...(groups.get(row.prompt) || []), row]);
    // Prompts that several arms answered come first: they can be compared.
    const order = [...groups].sort((a, b) => distinct(b[1].map((r) => r.arm)).length - distinct(a[1].map((r) => r.arm)).length);
    const blocks = order.slice(0, numShown).map(([i, group]) => {
      const block = make("div", "", "prompt");
      const grid = make("div", "", "answers");
      grid.append(...group.slice(0, 40).map(card));
      block.append(make("h3", prompts[i][1]), make("pre", prompts[i][2]), grid);
      if (group.length > 40) block.append(make("p", `${group.length - 40} more: choose a step or an arm`, "note"));
      return block;
    });
    document.getElementById("completions").replaceChildren(...blocks);
    document.getElementById("found").textContent =
      `${found.length} completions of ${groups.size} prompts${groups.size > numShown ? `, ${numShown} prompts shown` : ""}`;
    more.hidden = groups.size <= numShown;
  };
  const datasets = distinct(prompts.map(([dataset]) => dataset));
  options("dataset", datasets.map((name) => [name, name]), datasets.length > 1 ? "all" : "");
  const steps = distinct(rows.map((row) => row.step)).sort((a, b) => a - b);
  options("step", steps.map((step) => [String(step), String(step)]), "all");
  options("arm", arms.map((name, i) => [String(i), name]), "all");
  options("status", distinct(rows.map((row) => row.status)).map((status) => [status, plain(status)]), "all");
  field("step").value = String(steps.at(-1));
  form.hidden = false;
  const restart = () => { numShown = PAGE; update(); };
  form.addEventListener("input", restart);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { numShown += PAGE; update(); });
  update();
})();
