// What groups and boxes saved and lost, as numbers and in words, and the colours that stand for these.
"use strict";
const fx = {data: JSON.parse(document.getElementById("data").textContent)};
fx.merged = fx.data.summary.parameters.length > 1;

fx.text = (() => {
  const whole = d3.format(",d");

  function short(number) { // three digits and a unit; exact below 10,000
    if (!Number.isFinite(number)) return "–"; // not every cost can be counted
    return number < 1e4 ? whole(number) : d3.format(".3s")(number).replace(/([kMGTP])$/, " $1");
  }

  function difference(before, after) { // −50 %
    const percent = Math.abs(100 * (after - before) / before);
    return `${after < before ? "−" : "+"}${percent < 1 ? percent.toPrecision(1) : percent.toFixed(0)} %`;
  }

  function change(before, after, form = whole) { // 64 → 32 (−50 %), which cannot be read as in and out channels
    if (after === undefined || after === before) return form(before);
    const known = Number.isFinite(before) && Number.isFinite(after) && before > 0;
    return `${form(before)} → ${form(after)}${known ? ` (${difference(before, after)})` : ""}`;
  }

  function error(value) {
    if (!Number.isFinite(value)) return "–";
    return value > 0 && value < 1e-4 ? value.toExponential(0) : `${+value.toPrecision(2)}`;
  }

  const counted = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
  const cut = (text, most) => text.length <= most ? text : `${text.slice(0, most / 2)}…${text.slice(-most / 2)}`;
  return {whole, short, difference, change, error, counted, cut, costs: ([before, after]) => change(before, after, short)};
})();

fx.measure = (() => {
  const {groups, boxes} = fx.data;
  const refit = new Map(groups.flatMap((g) => g.refit).map((r) => [r.name, r]));
  const isMeasured = [...refit.values()].some((r) => Number.isFinite(r.after));
  const saved = ([before, after]) => Number.isFinite(after) && Number.isFinite(before) ? before - after : 0;
  const finite = (values) => values.filter(Number.isFinite);

  // The relative square error of layers after refit; without refit, what kept channels do not carry of a group's rows.
  const ofGroup = (g) => isMeasured ? d3.mean(finite(g.refit.map((r) => r.after))) : g.dropped ? g.estimate : undefined;
  const ofBox = (box) => isMeasured
    ? d3.max(finite(box.modules.map((name) => refit.get(name)?.after)))
    : d3.max(box.roles.filter(([g, role]) => role === "producer" && groups[g].dropped).map(([g]) => groups[g].estimate));

  const groupLoss = groups.map(ofGroup), boxLoss = boxes.map(ofBox);
  return {
    isMeasured, groupLoss, boxLoss, mostLoss: d3.max(boxLoss) || 1,
    lossName: isMeasured ? "error" : "estimated loss",
    lossText: isMeasured
      ? "relative square error of a layer's outputs after refit, on samples held out"
      : "estimated from the weights: the share of the channels that no kept channel carries",
    groupSaved: groups.map((g) => saved(g.parameters)), boxSaved: boxes.map((b) => saved(b.parameters)),
    total: (all, which) => { // [before, after] of several boxes
      const sums = fx.data.summary.parameters.map((_, i) => d3.sum(all, (at) => boxes[at][which][i]));
      return all.some((at) => boxes[at][which].some((v) => !Number.isFinite(v))) ? sums.map(() => NaN) : sums;
    },
  };
})();

fx.colour = (() => {
  const strengths = {error: "--loss", saving: "--gain"};
  let by = "group", most = 1;

  function value(item) {
    return by === "error" ? d3.max(item.boxes, (at) => fx.measure.boxLoss[at]) : d3.sum(item.boxes, (at) => fx.measure.boxSaved[at]);
  }

  function tint(item) { // from 0 to 1; undefined where nothing is known
    const v = value(item);
    return Number.isFinite(v) ? Math.sqrt(Math.max(v, 0) / most) : undefined;
  }

  const mixed = (share, base) => `color-mix(in srgb, var(${strengths[by]}) ${Math.round(100 * share)}%, var(${base}))`;
  return {
    get by() { return by; },
    get most() { return most; },
    choose: (name) => { by = name; },
    scale: (items) => { most = by === "group" ? 1 : d3.max(items, value) || 1; },
    body: (item) => by === "group" || tint(item) === undefined ? null : mixed(0.42 * tint(item), "--card"), // text stays legible
    dot: (item, chosen) => { // on the map
      if (by !== "group") return mixed(tint(item) ?? 0, "--none");
      const group = item.groups.has(chosen) ? chosen : item.holds[0];
      return group === undefined ? "var(--wire)" : fx.data.groups[group].colour;
    },
    wire: (groups, chosen) => by === "group" || groups.has(chosen) ? fx.data.groups[groups.has(chosen) ? chosen : fx.chosenGroup([...groups])].colour : null,
  };
})();
