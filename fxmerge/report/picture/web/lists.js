// The panel's three lists: groups, layers beside the original's, and what was not merged; each sorted and filtered.
"use strict";
fx.lists = (() => {
  const {groups, boxes, refusals} = fx.data, {measure, text, widgets} = fx;
  const PAGE = 100; // rows that a list shows at first, and with each click more
  const state = {tab: "groups", filter: {groups: "", layers: "", refusals: ""}, sort: {groups: fx.merged ? "saved" : "order", layers: "order"}, which: "parameters"};
  const descending = (values) => (one, other) => d3.descending(values[one] ?? -1, values[other] ?? -1) || one - other;
  const names = {
    groups: groups.map((g) => [g.name, ...g.producers, ...g.per_channel_params, ...g.consumers, ...g.mixers, ...g.ties].join("\n").toLowerCase()),
    layers: boxes.map((b) => `${b.modules.join("\n")}\n${b.op}`.toLowerCase()),
    refusals: refusals.map((r) => `${r.name}\n${r.reason}`.toLowerCase()),
  };
  const isCosted = (b) => b.parameters[0] > 0 || b.flops[0] > 0;

  const sorts = {
    groups: {
      saved: ["saves most parameters", descending(measure.groupSaved)],
      loss: [`loses most (${measure.lossName})`, descending(measure.groupLoss)],
      wide: ["widest", descending(groups.map((g) => g.channels))],
      order: ["in network order", d3.ascending],
    },
    layers: {
      order: ["in network order", d3.ascending],
      saved: ["saves most parameters", descending(measure.boxSaved)],
      loss: [`loses most (${measure.lossName})`, descending(measure.boxLoss)],
      large: ["largest", descending(boxes.map((b) => b.parameters[0]))],
    },
  };
  if (!fx.merged) for (const each of Object.values(sorts)) { delete each.saved; delete each.loss; }

  function choice(place, label, options, chosen, act) {
    const field = place.append("label").attr("class", "field");
    field.append("span").text(label);
    field.append("select").on("change", function () { act(this.value); fill(); })
      .selectAll("option").data(options).join("option").attr("value", (o) => o[0]).property("selected", (o) => o[0] === chosen).text((o) => o[1]);
  }

  function found() { // the entries of the current list, in order
    const {tab} = state, sought = state.filter[tab].trim().toLowerCase();
    const all = d3.range(names[tab].length).filter((at) => tab !== "layers" || isCosted(boxes[at]));
    const matching = all.filter((at) => names[tab][at].includes(sought));
    return [tab === "refusals" ? matching : matching.sort(sorts[tab][state.sort[tab]][1]), all.length];
  }

  function fact(at) { // what a row says beside the width: the figure that the list is sorted by
    const by = state.sort.groups, loss = measure.groupLoss[at], saved = measure.groupSaved[at];
    if (groups[at].refused) return "not merged";
    if (by === "loss") return Number.isFinite(loss) ? `${measure.lossName} ${text.error(loss)}` : "";
    return fx.merged ? (saved > 0 ? `saves ${text.short(saved)}` : "") : `${text.short(groups[at].parameters[0])} parameters`;
  }

  function fill(most = PAGE) {
    const [hits, all] = found(), list = d3.select("#list"), {tab} = state;
    d3.select("#count").text(hits.length < all ? `${hits.length} of ${all}` : all ? "" : {groups: "There are no groups.", layers: "There are no layers.", refusals: "Nothing was left out."}[tab]);
    list.node().replaceChildren();
    const value = (b) => state.which === "channels" ? b.before : b[state.which][0];
    const largest = d3.max(boxes, (b) => isCosted(b) ? value(b) : 0) || 1;
    for (const at of hits.slice(0, most)) {
      if (tab === "groups") widgets.groupRow(list, at, fact(at));
      if (tab === "layers") widgets.boxRow(list, at, state.which, largest);
      if (tab === "refusals") widgets.refusal(list.append("li"), refusals[at]);
    }
    if (hits.length > most) list.append("li").append("button").attr("class", "more").text(`${text.counted(hits.length - most, "more")}`.replace(/s$/, ""))
      .on("click", () => fill(most + PAGE));
  }

  const hints = {
    groups: "Layers of one colour keep and drop the same channels. Choose a group to see it in the network.",
    layers: fx.merged ? "Each layer in the original (upper bar) and in the merged model (lower bar)." : "",
    refusals: "Channels that stay as they are, and why.",
  };

  function show(panel) {
    const tabs = panel.append("div").attr("role", "tablist").attr("aria-label", "Lists");
    const titles = [["groups", "Groups", groups.length], ["layers", "Layers", boxes.filter(isCosted).length], ["refusals", "Not merged", refusals.length]];
    const buttons = tabs.selectAll("button").data(titles).join("button").attr("role", "tab").attr("id", ([name]) => `tab-${name}`)
      .attr("aria-controls", "lists").text(([, title, count]) => `${title} (${count})`).on("click", (event, [name]) => turn(name))
      .on("keydown", (event) => {
        const at = titles.findIndex(([name]) => name === state.tab), step = {ArrowRight: 1, ArrowLeft: 2}[event.key];
        if (step) { event.stopPropagation(); turn(titles[(at + step) % 3][0]); buttons.nodes()[(at + step) % 3].focus(); }
      });
    const body = panel.append("div").attr("id", "lists").attr("role", "tabpanel");

    function turn(name) {
      state.tab = name;
      buttons.attr("aria-selected", ([other]) => String(other === name)).attr("tabindex", ([other]) => other === name ? 0 : -1);
      body.attr("aria-labelledby", `tab-${name}`).node().replaceChildren();
      if (hints[name]) body.append("p").attr("class", "soft").text(hints[name]);
      const controls = body.append("div").attr("class", "controls");
      controls.append("input").attr("id", "filter").attr("type", "search").attr("placeholder", "Filter by name").attr("autocomplete", "off")
        .attr("aria-label", `Filter ${titles.find((t) => t[0] === name)[1].toLowerCase()} by name`).property("value", state.filter[name])
        .on("input", function () { state.filter[name] = this.value; fill(); })
        .on("keydown", function (event) {
          event.stopPropagation();
          if (event.key === "Escape") { this.value = state.filter[name] = ""; fill(); }
        });
      if (name === "layers") choice(controls, "Compare", [["parameters", "parameters"], ["flops", "FLOPs"], ["channels", "channels"]], state.which, (v) => { state.which = v; });
      if (sorts[name]) choice(controls, "Sort", Object.entries(sorts[name]).map(([key, [title]]) => [key, title]), state.sort[name], (v) => { state.sort[name] = v; });
      body.append("p").attr("id", "count").attr("class", "soft").attr("role", "status");
      body.append("ul").attr("id", "list");
      fill();
    }
    turn(state.tab);
  }

  return {show};
})();
