// The report's browser of pairs: a table to sort, search and filter, and each pair to read.
// Texts of the data only ever become text nodes. Nothing is fetched.
"use strict";
(async () => {
  const PAGE = 100, BINS = 40, MOST_WORDS = 1200;
  const section = document.getElementById("browser");
  const packed = Uint8Array.from(atob(document.getElementById("pairs-data").textContent.trim()), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const { pairs, flags, sources } = await new Response(stream).json();
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter(child => child !== null));
    return element;
  };
  const said = text => text.map(([, content]) => content).join("\n");
  const number = (value, digits) => value === null ? "–" : value.toFixed(digits);
  for (const pair of pairs) {
    pair.words = [pair.id, said(pair.prompt), said(pair.chosen), said(pair.rejected)].join("\n").toLowerCase();
    pair.start = said(pair.prompt).slice(0, 140).replace(/\s+/g, " ");
  }

  const columns = [
    ["difficulty", "Difficulty", pair => number(pair.difficulty, 4)],
    ["start", "Prompt", pair => pair.start],
    ["p_wrong", "p(wrong)", pair => number(pair.p_wrong, 2)],
    ["spread", "Spread", pair => number(pair.spread, 4)],
    ["chosen_tokens", "Chosen", pair => String(pair.chosen_tokens)],
    ["rejected_tokens", "Rejected", pair => String(pair.rejected_tokens)],
    ["source", "Source", pair => sources[pair.source]],
    ["selected", "Selected", pair => pair.selected ? "yes" : "no"],
    ["flags", "Flags", pair => flags.filter((_, bit) => pair.flags >> bit & 1).join(", ")],
  ].filter(([name]) => pairs.some(pair => pair[name] !== null && pair[name] !== "")
    && (name !== "source" || sources.length > 1) && (name !== "flags" || flags.length > 0));
  const state = { sort: "difficulty", falls: false, shown: PAGE, low: -Infinity, high: Infinity, open: null };
  let found = pairs;

  // --- what is asked for -----------------------------------------------------------------------------------
  const search = make("input", { type: "search", id: "pair-search", placeholder: "words or an id", oninput: refresh });
  const choice = (id, label, names) => make("label", {}, label, make("select", { id, onchange: refresh },
    make("option", { value: "" }, "all"), ...names.map((name, value) => make("option", { value }, name))));
  const low = make("input", { type: "number", step: "any", id: "pair-low", oninput: refresh });
  const high = make("input", { type: "number", step: "any", id: "pair-high", oninput: refresh });
  const status = make("p", { class: "note", role: "status" });
  const head = make("tr"), body = make("tbody");
  const more = make("button", { type: "button", onclick: () => { state.shown += PAGE; draw(); } }, "Show more");
  const histogram = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  section.append(
    make("form", { class: "filters", onsubmit: event => event.preventDefault() },
      make("label", {}, "Search ", search),
      choice("pair-selected", "Selected ", ["no", "yes"]),
      sources.length > 1 ? choice("pair-source", "Source ", sources) : null,
      flags.length ? choice("pair-flag", "Flag ", flags) : null,
      make("label", {}, "Difficulty from ", low), make("label", {}, "to ", high),
      make("button", { type: "button", onclick: clear }, "Clear")),
    histogram, status,
    make("div", { class: "scroll" }, make("table", { class: "pairs" }, make("thead", {}, head), body)), more);
  section.hidden = false;

  // --- the histogram: a bar is a range of difficulty to look at ------------------------------------------------
  const sorted = pairs.map(pair => pair.difficulty).sort((a, b) => a - b);
  const at = share => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  const first = at(0.005), width = Math.max((at(0.995) - first) / BINS, 1e-9);
  const bin = value => Math.max(0, Math.min(BINS - 1, Math.floor((value - first) / width)));
  histogram.setAttribute("viewBox", `0 0 ${BINS * 10} 84`);
  histogram.setAttribute("class", "bars");
  histogram.setAttribute("preserveAspectRatio", "none");
  const bars = Array.from({ length: BINS }, (_, place) => {
    const group = document.createElementNS(histogram.namespaceURI, "g");
    group.setAttribute("tabindex", "0");
    group.setAttribute("role", "button");
    const parts = ["hit", "all", "now"].map(kind => {
      const rect = document.createElementNS(histogram.namespaceURI, "rect");
      rect.setAttribute("class", kind);
      rect.setAttribute("x", place * 10 + 0.5);
      rect.setAttribute("width", 9);
      group.append(rect);
      return rect;
    });
    parts[0].setAttribute("height", 84);
    const choose = event => {
      const from = place ? first + place * width : -Infinity;
      const to = place < BINS - 1 ? first + (place + 1) * width : Infinity;
      const wider = event.shiftKey && (low.value || high.value);
      low.value = isFinite(from) ? (wider ? Math.min(from, low.value || -Infinity) : from).toFixed(4) : "";
      high.value = isFinite(to) ? (wider ? Math.max(to, high.value || Infinity) : to).toFixed(4) : "";
      refresh();
    };
    group.addEventListener("click", choose);
    group.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(event); } });
    histogram.append(group);
    return { group, parts };
  });
  const count = list => list.reduce((counts, pair) => { counts[bin(pair.difficulty)]++; return counts; }, Array(BINS).fill(0));
  const total = count(pairs), tallest = Math.max(...total);

  function drawBars() {
    const now = count(found);
    bars.forEach(({ group, parts: [, all, chosen] }, place) => {
      for (const [rect, height] of [[all, total[place]], [chosen, now[place]]]) {
        const scaled = 80 * height / tallest;
        rect.setAttribute("y", 84 - scaled);
        rect.setAttribute("height", scaled);
      }
      const edge = (first + place * width).toFixed(3);
      group.setAttribute("aria-label", `difficulty from ${edge}: ${now[place]} of ${total[place]} pairs`);
    });
  }

  // --- the table -------------------------------------------------------------------------------------------------
  for (const [name, label] of columns) {
    head.append(make("th", { scope: "col", id: `sort-${name}` }, make("button", { type: "button", onclick: () => {
      state.falls = state.sort === name && !state.falls;
      state.sort = name;
      refresh();
    } }, label)));
  }

  function refresh() {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const value = id => document.getElementById(id)?.value ?? "";
    const [selected, source, flag] = ["pair-selected", "pair-source", "pair-flag"].map(value);
    const from = low.value === "" ? -Infinity : Number(low.value), to = high.value === "" ? Infinity : Number(high.value);
    found = pairs.filter(pair => pair.difficulty >= from && pair.difficulty <= to
      && (selected === "" || Number(pair.selected) === Number(selected))
      && (source === "" || pair.source === Number(source))
      && (flag === "" || pair.flags >> Number(flag) & 1)
      && words.every(word => pair.words.includes(word)));
    const sign = state.falls ? -1 : 1;
    found.sort((a, b) => {
      const [left, right] = [a[state.sort], b[state.sort]];
      if (left === null || right === null) return (left === null) - (right === null);
      return sign * (left < right ? -1 : left > right ? 1 : 0) || a.rank - b.rank;
    });
    state.shown = PAGE;
    draw();
    drawBars();
  }

  function draw() {
    for (const [name] of columns) {
      document.getElementById(`sort-${name}`).setAttribute("aria-sort",
        state.sort !== name ? "none" : state.falls ? "descending" : "ascending");
    }
    body.replaceChildren(...found.slice(0, state.shown).map(pair => make("tr", {},
      ...columns.map(([name, , show]) => name === "start"
        ? make("td", { class: "start" }, make("button", { type: "button", "data-pair": pair.id, onclick: () => open(pair) }, show(pair) || "(no text)"))
        : make("td", {}, show(pair))))));
    more.hidden = found.length <= state.shown;
    status.textContent = `${found.length.toLocaleString("en")} of ${pairs.length.toLocaleString("en")} pairs`;
  }

  function clear() {
    for (const field of section.querySelectorAll("input, select")) field.value = "";
    refresh();
  }

  // Arrows move from pair to pair.
  body.addEventListener("keydown", event => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = event.target.closest("tr");
    const next = step && row && (step > 0 ? row.nextElementSibling : row.previousElementSibling);
    if (next) { event.preventDefault(); next.querySelector("button").focus(); }
  });

  // --- one pair ------------------------------------------------------------------------------------------------------
  const dialog = make("dialog", { "aria-labelledby": "pair-title", onclose: () => {
    history.replaceState(null, "", location.pathname + location.search);
    document.querySelector(`[data-pair="${state.open}"]`)?.focus();
  } });
  section.append(dialog);

  function open(pair) {
    state.open = pair.id;
    const [chosen, rejected] = marked(pair.chosen, pair.rejected);
    const known = columns.filter(([name]) => name !== "start").map(([, label, show]) => `${label.toLowerCase()} ${show(pair) || "none"}`);
    dialog.replaceChildren(
      make("form", { method: "dialog" }, make("button", {}, "Close")),
      make("h3", { id: "pair-title" }, `Pair ${pair.id}`),
      make("p", { class: "note" }, `rank ${(pair.rank + 1).toLocaleString("en")} · ${known.join(" · ")}`),
      part("Prompt", pair.prompt),
      make("div", { class: "answers" }, part("Chosen", pair.chosen, chosen), part("Rejected", pair.rejected, rejected)));
    if (!dialog.open) dialog.showModal();
    history.replaceState(null, "", `#pair=${encodeURIComponent(pair.id)}`);
  }

  function part(title, turns, shown) {
    return make("section", { class: `text ${title.toLowerCase()}` }, make("h5", {}, title), ...turns.flatMap(([role, content, cut], place) => [
      role ? make("p", { class: "role" }, role) : null,
      make("pre", { dir: "auto" }, ...(shown ? shown[place] : [content])),
      cut ? make("p", { class: "cut" }, `${cut.toLocaleString("en")} more characters are not shown.`) : null,
    ]));
  }

  // Words that only one of the two answers has, in its order (longest common subsequence).
  function marked(left, right) {
    if (left.length !== 1 || right.length !== 1) return [null, null];
    const [a, b] = [left, right].map(([[, text]]) => text.match(/\s+|[^\s]+/g) ?? []);
    if (a.length > MOST_WORDS || b.length > MOST_WORDS) return [null, null];
    const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) {
      table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
    const own = [[], []]; // words, and whether only this answer has them
    let i = 0, j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i] === b[j]) { own[0].push([a[i++], false]); own[1].push([b[j++], false]); }
      else if (j >= b.length || (i < a.length && table[i + 1][j] >= table[i][j + 1])) own[0].push([a[i++], true]);
      else own[1].push([b[j++], true]);
    }
    return own.map(words => [joined(words)]);
  }

  function joined(words) {
    const parts = [];
    for (const [word, isOwn] of words) {
      if (parts.length && parts.at(-1)[1] === isOwn) parts.at(-1)[0] += word;
      else parts.push([word, isOwn]);
    }
    return parts.map(([text, isOwn]) => isOwn ? make("mark", {}, text) : text);
  }

  function follow() {
    const id = decodeURIComponent(new URLSearchParams(location.hash.slice(1)).get("pair") ?? "");
    const pair = id && pairs.find(each => each.id === id);
    if (pair) open(pair);
  }
  window.addEventListener("hashchange", follow);
  refresh();
  follow();
})();
