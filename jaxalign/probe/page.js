"use strict";
// Draws the charts of a probe's report from the numbers in #data. No library, no network.
(() => {
  const $ = (id) => document.getElementById(id);
  const D = JSON.parse($("data").textContent);
  const L = D.layers + 1, G = D.codes.length, S = D.systems.length, P = D.poolings.length;
  const RETRIEVAL = D.scores, FORMS = Object.keys(D.forms);
  const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  const DASHES = ["5 3", "1.5 3", "8 3 2 3"];
  const names = D.names.map((name, g) => (name === D.codes[g] ? name : `${name} ${D.codes[g]}`));

  // Numbers ------------------------------------------------------------------------------------
  const digit = new Uint8Array(128);
  [...ALPHABET].forEach((letter, value) => { digit[letter.charCodeAt(0)] = value; });
  const pairs = {};
  for (const [score, text] of Object.entries(D.pairs)) {
    const values = new Float32Array(text.length / 2);
    for (let i = 0; i < values.length; i++) {
      const whole = digit[text.charCodeAt(2 * i)] * 64 + digit[text.charCodeAt(2 * i + 1)];
      values[i] = whole === 4095 ? NaN : whole / 1000;
    }
    pairs[score] = values;
  }
  const pair = (score, s, p, layer, a, b) => pairs[score][(((s * P + p) * L + layer) * G + a) * G + b];
  // As keyed in table.py; what is not measured by other states stays as it is.
  const keyed = (score, form) => {
    const key = form === "raw" ? score : `${form}_${score}`;
    return key in pairs || key in D.pivoted ? key : score;
  };
  const byStates = (score, form) => (keyed(score, form) === score ? "" : `, ${D.forms[form]} states`);
  const mean = (values) => {
    let sum = 0, count = 0;
    for (const value of values) if (value !== null && !Number.isNaN(value)) { sum += value; count++; }
    return count ? sum / count : NaN;
  };
  const layers = [...Array(L).keys()];

  // As curve_of in reading.py: directions from and to the members; with the pivot, the others.
  const languages = [...Array(G).keys()];
  function curve(score, s, p, members) {
    return layers.map((l) => mean(score in pairs
      ? members.flatMap((a) => languages.flatMap((b) => [pair(score, s, p, l, a, b), pair(score, s, p, l, b, a)]))
      : members.filter((g) => g !== D.pivot).map((g) => D.pivoted[score][s][p][l][g])));
  }
  const share = (x, digits = 1) => (Number.isNaN(x) ? "not measured" : `${(100 * x).toFixed(digits)} %`);
  const show = (score, x) => (score === "cka" ? (Number.isNaN(x) ? "not measured" : x.toFixed(3)) : share(x));

  // SVG ----------------------------------------------------------------------------------------
  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes ?? {})) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  function html(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes ?? {})) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  const dash = (s) => (s === S - 1 ? "" : DASHES[s % DASHES.length]);
  function path(values, x, y) {
    let text = "", pen = false;
    values.forEach((value, i) => {
      if (value === null || Number.isNaN(value)) { pen = false; return; }
      text += `${pen ? "L" : "M"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = true;
    });
    return text;
  }
  // About `count` round numbers from low to high.
  function ticks(low, high, count) {
    const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * unit).find((k) => k >= raw * 0.999);
    const found = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(+v.toPrecision(10));
    return found;
  }
  const above = (marks) => +(2 * marks.at(-1) - (marks.at(-2) ?? 0)).toPrecision(10);
  function layerTicks(width) {
    const step = [1, 2, 4, 5, 8, 10, 16, 20].find((k) => D.layers / k <= width / 42) ?? 40;
    return layers.filter((l) => l % step === 0);
  }

  // Curves -------------------------------------------------------------------------------------
  const picked = new Map();  // key -> {label, members, colour}
  const colourOf = (number) => `var(--c${number % 6})`;
  function freeColour() {
    const used = [...picked.values()].map((one) => one.colour);
    const free = [0, 1, 2, 3, 4, 5].map(colourOf).find((colour) => !used.includes(colour));
    return free ?? colourOf(picked.size);
  }
  function toggle(button, key, one) {
    if (picked.has(key)) picked.delete(key);
    else picked.set(key, { ...one, id: key, colour: one.members.length === G ? "var(--ink)" : freeColour() });
    const on = picked.has(key);
    button.setAttribute("aria-pressed", on);
    button.style.setProperty("--own", on ? picked.get(key).colour : "");
    drawCurve();
  }
  function chip(key, one) {
    const button = html("button", { type: "button", "aria-pressed": "false" }, html("i"), one.label);
    button.addEventListener("click", () => toggle(button, key, one));
    return button;
  }

  let cursor = null;  // layer under the pointer
  let stage = null;   // what the pointer needs of the last drawing
  function drawCurve() {
    const plain = $("score").value, score = keyed(plain, $("form").value), p = +$("pooling").value;
    const words = D.titles[plain] + byStates(plain, $("form").value);
    $("form").disabled = FORMS.every((form) => keyed(plain, form) === plain);
    const box = $("curve"), width = Math.max(280, box.clientWidth), height = width < 560 ? 270 : 360;
    const left = 44, right = 16, top = 40, bottom = 40;
    const lines = [];
    for (let s = 0; s < S; s++)
      for (const one of picked.values())
        lines.push({ ...one, s, values: curve(score, s, p, one.members) });
    const retrieval = score in pairs;
    const control = retrieval ? D.health.shuffled.map((one) => one[p]) : [];
    const all = [...lines.flatMap((line) => line.values), ...control.flat()].filter((v) => v !== null && !Number.isNaN(v));
    const most = Math.max(0.02, ...all), least = Math.min(0, ...all);
    const marks = ticks(least, most, 5);
    if (marks.at(-1) < most - 1e-9) marks.push(above(marks));
    const high = marks.at(-1), low = Math.min(marks[0], least);
    const x = (l) => left + ((width - left - right) * l) / D.layers;
    const y = (v) => top + (height - top - bottom) * (1 - (v - low) / (high - low));
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    for (const mark of marks) {
      root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
      const number = score === "cka" ? `${mark}` : `${+(100 * mark).toPrecision(4)} %`;
      root.append(svg("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, number));
    }
    for (const l of layerTicks(width - left - right))
      root.append(svg("text", { x: x(l), y: height - bottom + 17, "text-anchor": "middle" }, `${l}`));
    root.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "layer (0 = embeddings)"));
    root.append(svg("text", { x: x(0.125 * D.layers), y: top - 22, "text-anchor": "middle" }, "depth, %"));
    for (const share of [0, 25, 50, 75, 100]) {
      const at = x((share / 100) * D.layers);
      root.append(svg("line", { class: "axis", x1: at, x2: at, y1: top - 4, y2: top }));
      root.append(svg("text", { x: at, y: top - 8, "text-anchor": "middle" },
        `${share}`));
    }
    root.append(svg("line", { class: "chosen", x1: x(D.chosen), x2: x(D.chosen), y1: top, y2: height - bottom }));
    const turned = x(D.chosen) > width - 90;
    root.append(svg("text", { class: "strong", x: x(D.chosen) + (turned ? -5 : 5), y: height - bottom - 6, "text-anchor": turned ? "end" : "start" }, `block ${D.chosen}`));
    control.forEach((values, s) => root.append(svg("path", { class: "curve thin", d: path(values, x, y), "stroke-dasharray": dash(s) })));
    for (const line of lines) {
      const mark = svg("path", { class: "curve", d: path(line.values, x, y), "stroke-dasharray": dash(line.s) });
      mark.style.stroke = line.colour;
      root.append(mark);
    }
    const cross = svg("g");
    root.append(cross);
    box.replaceChildren(root);
    stage = { x, y, left, right, top, bottom, width, height, lines, cross, score, control };
    drawCross();
    const pivot = D.names[D.pivot];
    $("curve-words").textContent = retrieval
      ? `Share of sentences whose translation comes first (${words}). Mean over all directions from and to a language, or a group's languages.`
      : `${words} with ${pivot}, mean over languages.`;
    box.setAttribute("aria-label", `${words} by layer`);
    box.setAttribute("aria-valuemax", D.layers);
  }
  function key(colour, dashes, words, width = 2.2) {
    const line = svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": width, "stroke-dasharray": dashes });
    line.style.stroke = colour;
    return html("span", {}, svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, line), words);
  }
  function drawCross() {
    const { x, y, top, bottom, height, lines, cross } = stage;
    const l = cursor ?? D.chosen;
    cross.replaceChildren();
    if (cursor !== null) cross.append(svg("line", { class: "cross", x1: x(l), x2: x(l), y1: top, y2: height - bottom }));
    for (const line of lines) {
      if (Number.isNaN(line.values[l])) continue;
      const dot = svg("circle", { cx: x(l), cy: y(line.values[l]), r: 3.5 });
      dot.style.fill = line.colour;
      cross.append(dot);
    }
    valuesAt(l);
  }
  // Legend and numbers in one table: a line per group, a column per system.
  function valuesAt(l) {
    const { lines, score, control } = stage;
    const deep = `Layer ${l}, ${Math.round((100 * l) / D.layers)} % deep`;
    const head = html("tr", {}, html("th", { scope: "col" }, deep),
      ...D.systems.map((system, s) => html("th", { scope: "col" }, key("var(--ink)", dash(s), system))));
    const rows = [...picked.values()].map((one) => {
      const dot = html("i");
      dot.style.background = one.colour;
      const cells = lines.filter((line) => line.id === one.id).map((line) => html("td", {}, show(score, line.values[l])));
      return html("tr", {}, html("th", { scope: "row" }, dot, one.label), ...cells);
    });
    if (control.flat().some((value) => value !== null)) {
      const cells = control.map((values) => html("td", {}, share(values[l] ?? NaN)));
      rows.push(html("tr", {}, html("th", { scope: "row" }, html("i", { class: "control" }), "shuffled pairs (cosine)"), ...cells));
    }
    $("curve-values").replaceChildren(html("thead", {}, head), html("tbody", {}, ...rows));
    const words = lines.map((line) => `${line.label}, ${D.systems[line.s]}: ${show(score, line.values[l])}`);
    $("curve").setAttribute("aria-valuenow", l);
    $("curve").setAttribute("aria-valuetext", `${deep}. ${words.join("; ")}`);
  }
  function listenCurve() {
    const box = $("curve");
    const move = (event) => {
      const { left, right, width } = stage, frame = box.getBoundingClientRect();
      const at = ((event.clientX - frame.left) * width / frame.width - left) / (width - left - right);
      cursor = Math.min(D.layers, Math.max(0, Math.round(at * D.layers)));
      drawCross();
    };
    box.addEventListener("pointermove", move);
    box.addEventListener("pointerdown", move);
    box.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") { cursor = null; drawCross(); } });
    box.addEventListener("blur", () => { cursor = null; drawCross(); });
    box.addEventListener("keydown", (event) => {
      const l = cursor ?? D.chosen;
      const next = { ArrowLeft: l - 1, ArrowRight: l + 1, Home: 0, End: D.layers }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      cursor = Math.min(D.layers, Math.max(0, next));
      drawCross();
    });
  }

  // Maps ---------------------------------------------------------------------------------------
  const orders = {
    alike: D.order,
    class: [...D.order].sort((a, b) => (D.classes[a] ?? 0) - (D.classes[b] ?? 0)),
    name: D.order.slice().sort((a, b) => names[a].localeCompare(names[b], "en")),
  };
  const maps = {};
  const CELL = 14;
  const wordy = Math.max(...names.map((name) => name.length)) * 6.3 + 8;
  const tall = Math.max(...D.codes.map((code) => code.length)) * 7.2 + 8;
  function buildMap(id) {
    const box = $(id), order = orders[$("order").value], cell = Math.max(CELL, Math.min(60, 320 / G));
    const side = cell * G, width = wordy + side + 2, height = tall + side + 2;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    const cells = [];
    order.forEach((g, place) => {
      const at = cell * (place + 0.5);
      root.append(svg("text", { x: wordy - 4, y: tall + at + 4, "text-anchor": "end" }, names[g]));
      root.append(svg("text", { transform: `translate(${wordy + at + 4} ${tall - 4}) rotate(-90)` }, D.codes[g]));
      for (let column = 0; column < G; column++) {
        const rect = svg("rect", { x: wordy + cell * column, y: tall + cell * place, width: cell - 0.7, height: cell - 0.7 });
        cells.push(rect);
        root.append(rect);
      }
    });
    const at = svg("rect", { class: "at", width: cell, height: cell, visibility: "hidden" });
    root.append(at);
    box.replaceChildren(root);
    // Cells a finger can hit; narrower screens scroll inside the figure.
    box.style.minWidth = `${Math.min(width, Math.max(0, 9.5 * G + 0.75 * wordy))}px`;
    box.style.maxWidth = `${Math.max(width * 1.15, 300)}px`;
    maps[id] = { ...maps[id], cells, order, cell, at, width, height };
  }
  function paintMaps() {
    const plain = $("map-score").value, form = $("map-form").value, score = keyed(plain, form);
    const p = +$("pooling").value, s = +$("system").value, l = +$("layer").value;
    $("layer-words").textContent = `${l} of ${D.layers}, ${Math.round((100 * l) / D.layers)} %${l === D.chosen ? " (chosen)" : ""}`;
    $("map-title").textContent = `${D.systems[s]}, layer ${l}: ${D.titles[plain]}${byStates(plain, form)}`;
    const value = (a, b) => pair(score, s, p, l, a, b);
    paint("map", value, (x) => mix(x));
    if (S < 2) return;
    $("gain-title").textContent = `${D.systems[S - 1]} − ${D.systems[0]}, layer ${l}: percentage points`;
    const most = widest(score, p);
    const gain = (a, b) => pair(score, S - 1, p, l, a, b) - pair(score, 0, p, l, a, b);
    paint("gain", gain, (x) => {
      const part = Math.min(100, (100 * Math.abs(x)) / most).toFixed(1);
      return `color-mix(in srgb, var(--${x < 0 ? "loss" : "rise"}) ${part}%, var(--zero))`;
    });
    scale("gain-scale", `−${(100 * most).toFixed(0)}`, "linear-gradient(90deg, var(--loss), var(--zero), var(--rise))", `+${(100 * most).toFixed(0)} points`);
  }
  // The largest change in any layer, so that colours mean the same while the slider moves.
  const widths = {};
  function widest(score, p) {
    const name = `${score} ${p}`;
    if (!(name in widths)) {
      let most = 0.01;
      const size = L * G * G, values = pairs[score];
      for (let i = 0; i < size; i++) {
        const change = Math.abs(values[((S - 1) * P + p) * size + i] - values[p * size + i]);
        if (change > most) most = change;
      }
      widths[name] = Math.ceil(most * 100) / 100;
    }
    return widths[name];
  }
  function mix(x) {
    const at = x * (CIVIDIS.length - 1), i = Math.min(CIVIDIS.length - 2, Math.floor(at));
    const part = (from) => [1, 3, 5].map((k) => parseInt(CIVIDIS[from].slice(k, k + 2), 16));
    const [a, b] = [part(i), part(i + 1)];
    return `rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * (at - i))).join(" ")})`;
  }
  function paint(id, value, colour) {
    const { cells, order } = maps[id];
    order.forEach((a, row) => order.forEach((b, column) => {
      const x = value(a, b);
      cells[row * G + column].style.fill = Number.isNaN(x) ? "none" : colour(x);
    }));
    maps[id].value = value;
    read(id);
  }
  function read(id) {
    const { order, at, cell, row, column, value } = maps[id];
    if (row === undefined) {
      at.setAttribute("visibility", "hidden");
      $(id + "-readout").textContent = " ";
      return;
    }
    at.setAttribute("visibility", "visible");
    at.setAttribute("x", wordy + cell * column - 0.35);
    at.setAttribute("y", tall + cell * row - 0.35);
    const [a, b] = [order[row], order[column]], x = value(a, b);
    const words = Number.isNaN(x) ? "not measured" : id === "gain" ? `${x > 0 ? "+" : x < 0 ? "−" : ""}${Math.abs(100 * x).toFixed(1)} points` : share(x);
    $(id + "-readout").textContent = `${names[a]} → ${names[b]}: ${words}`;
  }
  function listenMap(id) {
    const box = $(id);
    const move = (event) => {
      const { cell, width } = maps[id], frame = box.firstChild.getBoundingClientRect(), zoom = width / frame.width;
      const column = Math.floor(((event.clientX - frame.left) * zoom - wordy) / cell);
      const row = Math.floor(((event.clientY - frame.top) * zoom - tall) / cell);
      if (row < 0 || column < 0 || row >= G || column >= G) return;
      Object.assign(maps[id], { row, column });
      read(id);
    };
    box.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") move(event); });
    box.addEventListener("pointerdown", move);
    box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const { row = 0, column = -step[1] } = maps[id];
      maps[id].row = Math.min(G - 1, Math.max(0, row + step[0]));
      maps[id].column = Math.min(G - 1, Math.max(0, column + step[1]));
      read(id);
    });
  }
  function scale(id, low, colours, high) {
    const bar = html("i");
    bar.style.background = colours;
    $(id).replaceChildren(low, bar, high);
  }

  // Health -------------------------------------------------------------------------------------
  function drawHealth() {
    const p = +$("pooling").value;
    $("panels").replaceChildren(...Object.entries(D.panels).map(([name, title]) => {
      const box = html("div", {}, html("h3", {}, title));
      $("panels").append(box);
      const width = Math.max(200, box.clientWidth || 300), height = 150, left = 44, right = 8, top = 10, bottom = 24;
      const series = D.systems.map((_, s) => D.health[name][s][p]);
      const known = series.flat().filter((v) => v !== null);
      const most = Math.max(...known, 1e-9), least = Math.min(...known);
      const log = least > 0 && most / least > 30;
      const f = log ? Math.log10 : (v) => v;
      const marks = log ? decades(least, most) : ticks(Math.min(0, least), most, 3);
      if (!log && marks.at(-1) < most) marks.push(above(marks));
      const low = f(Math.min(marks[0], log ? least : 0)), high = f(Math.max(marks.at(-1), most));
      const x = (l) => left + ((width - left - right) * l) / D.layers;
      const y = (v) => top + (height - top - bottom) * (1 - (f(v) - low) / (high - low || 1));
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": healthWords(title, series) });
      for (const mark of marks) {
        root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
        root.append(svg("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, mark >= 1e4 ? mark.toExponential(0) : `${mark}`));
      }
      for (const l of layerTicks((width - left - right) * 0.8))
        root.append(svg("text", { x: x(l), y: height - 6, "text-anchor": "middle" }, `${l}`));
      root.append(svg("line", { class: "chosen", x1: x(D.chosen), x2: x(D.chosen), y1: top, y2: height - bottom }));
      series.forEach((values, s) => {
        const line = svg("path", { class: "curve", d: path(values, x, y), "stroke-dasharray": dash(s) });
        line.style.stroke = colourOf(s);
        root.append(line);
      });
      const chart = html("div", { class: "chart" }, root);
      box.append(chart);
      return box;
    }));
    $("health-legend").replaceChildren(...D.systems.map((system, s) => key(colourOf(s), dash(s), system)));
  }
  const decades = (least, most) => {
    const found = [];
    for (let k = Math.floor(Math.log10(least)); k <= Math.ceil(Math.log10(most)); k++) found.push(+(10 ** k).toPrecision(3));
    return found;
  };
  const healthWords = (title, series) => `${title}: ` + series.map((values, s) =>
    `${D.systems[s]} ${values[0] ?? "not measured"} in layer 0, ${values[D.chosen] ?? "not measured"} in layer ${D.chosen}, ${values.at(-1) ?? "not measured"} in the last`).join("; ");

  // Table --------------------------------------------------------------------------------------
  function listenTable() {
    const heads = [...document.querySelectorAll("#table thead th")], body = document.querySelector("#table tbody");
    heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending", text = head.classList.contains("text");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const of = (row) => row.children[column].dataset.value;
      body.append(...[...body.children].sort((a, b) => {
        const [x, y] = [of(a), of(b)];
        if (x === "" || y === "") return (x === "") - (y === "");  // the unmeasured last
        const sign = up ? 1 : -1;
        return sign * (text ? x.localeCompare(y, "en") : x - y);
      }));
    }));
  }

  // Downloads ----------------------------------------------------------------------------------
  function save(name, kind, parts) {
    const link = html("a", { download: name, href: URL.createObjectURL(new Blob(parts, { type: kind })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  const number = (x) => (x === null || Number.isNaN(x) ? "" : `${+x.toFixed(6)}`);
  const field = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  function pairsCsv() {
    const scores = Object.keys(pairs);
    const rows = [`system,pooling,layer,source,target,${scores.join(",")}\n`];
    for (let s = 0; s < S; s++) for (let p = 0; p < P; p++) for (const l of layers)
      for (let a = 0; a < G; a++) for (let b = 0; b < G; b++) {
        const values = scores.map((score) => pair(score, s, p, l, a, b));
        if (values.every(Number.isNaN)) continue;
        rows.push(`${field(D.systems[s])},${field(D.poolings[p])},${l},${field(D.codes[a])},${field(D.codes[b])},${values.map(number).join(",")}\n`);
      }
    return rows;
  }
  const cellText = (cell) => (cell.tagName === "TH" ? cell.dataset.code : cell.dataset.value && `${+cell.dataset.value}`);
  const languagesCsv = () => [...document.querySelectorAll("#table tr")].map((row, place) =>
    [...row.children].map((cell) => field(place ? cellText(cell) : cell.textContent.replace(", %", ""))).join(",") + "\n");
  function everything() {
    const nested = (values, shape, at = 0) => {
      const [first, ...rest] = shape, size = rest.reduce((a, b) => a * b, 1);
      return [...Array(first).keys()].map((i) => (rest.length ? nested(values, rest, at + i * size)
        : Number.isNaN(values[at + i]) ? null : +values[at + i].toFixed(3)));
    };
    const unpacked = Object.fromEntries(Object.keys(pairs).map((score) => [score, nested(pairs[score], [S, P, L, G, G])]));
    return [JSON.stringify({ ...D, pairs: unpacked })];
  }

  // Start --------------------------------------------------------------------------------------
  const options = (id, entries) => $(id).append(...entries.map(([value, words]) => html("option", { value }, words)));
  document.body.classList.toggle("one-system", S < 2);
  document.body.classList.toggle("one-pooling", P < 2);
  document.body.classList.toggle("one-form", FORMS.length < 2);
  options("score", Object.entries(D.titles));
  options("map-score", RETRIEVAL.map((score) => [score, D.titles[score]]).reverse());
  for (const id of ["form", "map-form"]) options(id, Object.entries(D.forms));
  options("pooling", D.poolings.map((name, p) => [p, name]));
  options("system", D.systems.map((name, s) => [s, name]));
  Object.assign($("layer"), { max: D.layers, value: D.chosen });
  for (const [group, members] of Object.entries(D.groups)) {
    const label = members.length > 1 ? `${group} (${members.length})` : group;
    const button = chip(`group ${group}`, { label, members });
    $("groups").append(button);
  }
  D.names.forEach((_, g) => { if (g !== D.pivot) $("languages").append(chip(`language ${g}`, { label: names[g], members: [g] })); });
  $("pick").hidden = G < 3;
  [...$("groups").children].slice(0, 4).forEach((button) => button.click());
  const rebuild = () => { buildMap("map"); buildMap("gain"); maps.map.row = maps.gain.row = undefined; paintMaps(); };
  rebuild();
  scale("map-scale", "0", `linear-gradient(90deg, ${CIVIDIS.join(", ")})`, "100 % found");
  drawHealth();
  listenCurve();
  listenMap("map");
  listenMap("gain");
  listenTable();
  for (const id of ["score", "form"]) $(id).addEventListener("change", drawCurve);
  $("pooling").addEventListener("change", () => { drawCurve(); paintMaps(); drawHealth(); });
  for (const id of ["map-score", "map-form", "system"]) $(id).addEventListener("change", paintMaps);
  $("layer").addEventListener("input", paintMaps);
  $("order").addEventListener("change", rebuild);
  $("pairs-csv").addEventListener("click", () => save("pairs.csv", "text/csv", pairsCsv()));
  $("languages-csv").addEventListener("click", () => save("languages.csv", "text/csv", languagesCsv()));
  $("all-json").addEventListener("click", () => save("report.json", "application/json", everything()));
  let wide = $("curve").clientWidth;
  new ResizeObserver(() => {
    if ($("curve").clientWidth === wide) return;
    wide = $("curve").clientWidth;
    drawCurve();
    drawHealth();
  }).observe($("curve"));
})();
