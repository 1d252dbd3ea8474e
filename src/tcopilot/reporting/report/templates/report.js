"use strict";
// The rectification explorer. The layout of `data` is that of `examples` in page.py; nothing is loaded and no markup is parsed.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const app = document.getElementById("app");
  const PAGE = 20;
  const [BENCHMARK, ID, OUTCOME, PROMPT, GOLD, PILOT, FUSED, VIEW] = [0, 1, 2, 3, 4, 5, 6, 7];
  const KINDS = ["all", "fixed", "broken", "unchanged"];
  const state = { kind: "all", benchmark: "", words: "", page: 0 };

  const kindOf = (example) => (example[OUTCOME].startsWith("both") ? "unchanged" : example[OUTCOME]);
  const shorten = (value) => (Math.abs(value) >= 0.0005 ? value.toFixed(3) : value.toPrecision(1)).replace("-", "−");

  /** Make an element; properties that are no attributes of their own go by `set`. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  // Filters -----------------------------------------------------------------------------------------------------

  const fits = (example) =>
    (!state.benchmark || example[BENCHMARK] === state.benchmark) &&
    (!state.words || example[ID] === Number(state.words) ||
      [PROMPT, GOLD, PILOT, FUSED].some((place) => example[place].toLowerCase().includes(state.words)));

  function counts(examples) {
    const found = { all: examples.length, fixed: 0, broken: 0, unchanged: 0 };
    for (const example of examples) found[kindOf(example)] += 1;
    return found;
  }

  const buttons = Object.fromEntries(KINDS.map((kind) => [kind, make("button", {
    type: "button", "data-kind": kind, on: { click: () => change({ kind }) },
  })]));
  const benchmark = make("select", { id: "benchmark", on: { change: () => change({ benchmark: benchmark.value }) } },
    make("option", { value: "" }, "all benchmarks"), ...data.benchmarks.map((name) => make("option", { value: name }, name)));
  const search = make("input", { id: "search", type: "search", placeholder: "prompt, answer or id",
    on: { input: () => change({ words: search.value.trim().toLowerCase() }) } });
  const bar = make("div", { class: "bar" },
    make("div", { class: "group", role: "group", "aria-label": "Show" }, ...KINDS.map((kind) => buttons[kind])),
    make("label", {}, "benchmark", benchmark), make("label", {}, "search", search));
  const list = make("div", { id: "examples" });
  const where = make("span", { role: "status", "aria-live": "polite", id: "where" });
  const [back, on] = [["Previous", -1], ["Next", 1]].map(([text, step]) =>
    make("button", { type: "button", on: { click: () => change({ page: state.page + step }) } }, text));
  app.replaceChildren(sums(), bar, list, make("div", { class: "pages" }, back, on, where));

  function change(changes) {
    Object.assign(state, { page: 0 }, changes);
    const searched = data.examples.filter(fits);
    const found = counts(searched);
    for (const kind of KINDS) {
      buttons[kind].textContent = `${kind} ${found[kind].toLocaleString("en")}`;
      buttons[kind].setAttribute("aria-pressed", String(state.kind === kind));
    }
    const shown = searched.filter((example) => state.kind === "all" || kindOf(example) === state.kind);
    const first = state.page * PAGE, last = Math.min(first + PAGE, shown.length);
    list.replaceChildren(...shown.slice(first, last).map(entry));
    where.textContent = shown.length
      ? `${(first + 1).toLocaleString("en")}–${last.toLocaleString("en")} of ${shown.length.toLocaleString("en")} examples`
      : "No example fits.";
    back.disabled = first === 0;
    on.disabled = last >= shown.length;
  }

  /** Fixed − broken over all examples of a benchmark, beside the difference in results.json. */
  function sums() {
    const lines = data.benchmarks.map((name) => {
      const found = counts(data.examples.filter((example) => example[BENCHMARK] === name));
      const gain = data.gain.find((line) => line.benchmark === name && line.fixed !== null);
      const equal = found.fixed === gain.fixed && found.broken === gain.broken;
      const points = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(2)} points`;
      const here = gain.adds_up === null ? "" : ` = ${points((found.fixed - found.broken) / found.all)}`;
      return make("li", { "data-benchmark": name },
        `${name}: (${found.fixed} fixed − ${found.broken} broken) / ${found.all.toLocaleString("en")}${here}`,
        make("span", { class: equal ? "good" : "bad" }, equal ? "  ✓ as in results.json" : "  ✗ results.json has other counts"));
    });
    return make("ul", { class: "sum" }, ...lines);
  }

  // One example -------------------------------------------------------------------------------------------------

  const MARKS = { fixed: "✓ fixed", broken: "✗ broken", unchanged: "= " };

  function entry(example) {
    const kind = kindOf(example);
    const mark = kind === "unchanged" ? `= ${example[OUTCOME].replace("both ", "")}` : MARKS[kind];
    const details = make("details", { class: "example", "data-kind": kind },
      make("summary", {}, make("span", { class: `tag ${kind}` }, mark), make("span", { class: "clip" }, example[PROMPT]),
        make("span", { class: "clip" }, example[PILOT] === example[FUSED] ? example[FUSED] || "∅" : `${example[PILOT] || "∅"} → ${example[FUSED] || "∅"}`)));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(body(example));
    });
    return details;
  }

  function body(example) {
    const view = example[VIEW];
    const said = make("dl", { class: "said" });
    const add = (title, ...content) => said.append(make("dt", {}, title), make("dd", {}, ...content));
    add("prompt", example[PROMPT]);
    add(`right answer (${example[BENCHMARK]} ${example[ID]})`, example[GOLD]);
    if (view && view.emitted) {
      const pilot = view.pilot_emitted, fused = view.emitted.map((position) => position[0]);
      add("Pilot", ...chips(pilot, fused));
      add("Pilot + Copilot", ...chips(fused, pilot));
    } else {
      add("Pilot", example[PILOT]);
      add("Pilot + Copilot", example[FUSED]);
    }
    const place = make("div", { class: "body" }, said);
    if (!view) {
      place.append(make("p", { class: "note" }, "No trace of this example is on the page; eval.py trace=true trace_rows=null traces all."));
      return place;
    }
    const content = make("div");
    const choices = [["gold", "along the right answer"], ["emitted", "along the emitted answer"]].filter(([name]) => view[name]);
    const pick = (chosen) => {
      for (const [name, button] of picks) button.setAttribute("aria-pressed", String(name === chosen));
      content.replaceChildren(positions(view[chosen]), make("h3", {}, "Logit lens: the likeliest token at each layer"), lens(view[chosen]));
    };
    const picks = choices.map(([name, text]) => [name, make("button", { type: "button", on: { click: () => pick(name) } }, text)]);
    place.append(make("div", { class: "group", role: "group", "aria-label": "Positions" }, ...picks.map(([, button]) => button)), content);
    pick("gold");
    return place;
  }

  /** Tokens; those that differ from the other answer at their place are framed. */
  const chips = (tokens, others) => tokens.map((token, place) =>
    make("span", { class: token === others[place] ? "token" : "token other" }, data.tokens[token]));

  /** Tokens with scores; `largest` is the score of a full bar. */
  function top(pairs, target, largest) {
    const items = [];
    for (let i = 0; i < pairs.length; i += 2) {
      items.push(make("li", { class: pairs[i] === target ? "hit" : "", style: `--share: ${Math.min(100, 100 * Math.abs(pairs[i + 1]) / largest)}%` },
        make("span", {}, pairs[i] === target ? `▸ ${data.tokens[pairs[i]]}` : data.tokens[pairs[i]]), make("span", {}, shorten(pairs[i + 1]))));
    }
    return make("ol", { class: "top" }, ...items);
  }

  function positions(some) {
    const heads = ["position", "token", "top-5 before, p̂", "correction, f^C", "top-5 after, p̃", "‖f^C‖", "cosine with ℓ"];
    const rows = some.map(([token, before, correction, after, norm, cosine], place) => {
      const cells = [String(place + 1), make("span", { class: "token" }, data.tokens[token]), top(before, token, 1),
        top(correction, token, 1), top(after, token, 1), shorten(norm), shorten(cosine)];
      return make("tr", {}, ...cells.map((cell, i) => make("td", { "data-label": heads[i] }, cell)));
    });
    return scrolling("Target positions", make("table", { class: "positions stacked" },
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", {}, head)))), make("tbody", {}, ...rows)));
  }

  function lens(some) {
    const rows = [];
    for (const [name, place] of [["Copilot", 7], ["Pilot", 6]]) {
      const layers = some[0][place].length / 2;
      for (let layer = layers; layer >= 1; layer -= 1) {
        const cells = some.map((position) => {
          const [token, score] = position[place].slice(2 * layer - 2, 2 * layer);
          return make("td", { class: token === position[0] ? "hit" : "" }, data.tokens[token], " ", make("small", {}, shorten(score)));
        });
        rows.push(make("tr", { class: layer === layers ? "part" : "" }, make("th", { scope: "row" }, `${name} layer ${layer}`), ...cells));
      }
    }
    const head = make("tr", {}, make("th", {}, "target"), ...some.map(([token]) => make("th", { class: "word" }, data.tokens[token])));
    return scrolling("Logit lens", make("table", { class: "lens" }, make("thead", {}, head), make("tbody", {}, ...rows)));
  }

  const scrolling = (name, table) => make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, table);

  change({});
})();
