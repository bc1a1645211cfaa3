// The drawing of the network with d3: boxes, arrows, frames, highlighting, zoom, and the small map.
"use strict";
fx.scene = (() => {
  const svg = d3.select("#network"), map = d3.select("#map");
  const defs = svg.append("defs");
  const root = svg.append("g").attr("id", "scene");
  const layers = ["frames", "wires", "titles", "boxes"].map((name) => root.append("g").attr("class", name));
  const zoom = d3.zoom().scaleExtent([0.03, 3]).on("zoom", (event) => {
    root.attr("transform", event.transform);
    drawWindow();
  });
  svg.call(zoom).on("dblclick.zoom", null).on("click", (event) => { if (event.target === svg.node()) fx.choose(null); });
  map.append("use").attr("href", "#still");
  const still = defs.append("g").attr("id", "still");
  map.append("rect").attr("class", "window");
  let laid = null;

  defs.selectAll("pattern").data(fx.data.groups).join("pattern").attr("id", (_, at) => `hatch${at}`)
    .attr("width", 8).attr("height", 8).attr("patternUnits", "userSpaceOnUse").attr("patternTransform", "rotate(45)")
    .each(function (group) {
      d3.select(this).append("rect").attr("width", 8).attr("height", 8).attr("fill", group.colour);
      d3.select(this).append("line").attr("class", "hatch").attr("y2", 8).attr("x1", 4).attr("x2", 4);
    });
  const blank = defs.append("pattern").attr("id", "blank").attr("width", 8).attr("height", 8)
    .attr("patternUnits", "userSpaceOnUse").attr("patternTransform", "rotate(45)");
  blank.append("rect").attr("width", 8).attr("height", 8).attr("fill", "var(--bad)");
  blank.append("line").attr("class", "hatch").attr("y2", 8).attr("x1", 4).attr("x2", 4);

  const paint = (group) => fx.data.groups[group].refused ? `url(#hatch${group})` : fx.data.groups[group].colour;

  function path(points) { // horizontal and vertical lines with rounded corners
    const p = d3.path(), r = 7;
    p.moveTo(points[0].x, points[0].y);
    for (let i = 1; i < points.length - 1; i++) p.arcTo(points[i].x, points[i].y, points[i + 1].x, points[i + 1].y,
      Math.min(r, ...[-1, 1].map((d) => Math.hypot(points[i + d].x - points[i].x, points[i + d].y - points[i].y) / 2)));
    p.lineTo(points.at(-1).x, points.at(-1).y - 6);
    return p.toString();
  }

  function key(selection, act) {
    selection.attr("tabindex", 0).attr("role", "button").on("keydown", function (event, d) {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); act(event, d); }
    });
  }

  function drawFrames() {
    const frames = layers[0].selectAll("g.frame").data(laid.frames, (f) => f.id).join("g")
      .attr("class", (f) => `frame${f.depth % 2 ? " odd" : ""}`).attr("data-frame", (f) => f.frame);
    frames.selectAll("*").remove();
    frames.append("rect").attr("x", (f) => f.x).attr("y", (f) => f.y).attr("width", (f) => f.width)
      .attr("height", (f) => f.height).attr("rx", 8);
    const title = layers[2].selectAll("g.title").data(laid.frames, (f) => f.id).join("g") // drawn above the arrows
      .attr("class", (f) => `title${f.depth % 2 ? " odd" : ""}`).attr("aria-expanded", "true")
      .attr("aria-label", (f) => `Collapse ${fx.frames.get(f.frame).label}`);
    title.selectAll("*").remove();
    title.append("rect").attr("x", (f) => f.x + 1).attr("y", (f) => f.y + 1).attr("width", (f) => f.width - 2)
      .attr("height", 24).attr("rx", 7);
    title.append("text").attr("x", (f) => f.x + 10).attr("y", (f) => f.y + 18).text((f) => `− ${fx.frames.get(f.frame).label}`);
    title.on("click", (event, f) => fx.toggle(f.frame));
    key(title, (event, f) => fx.toggle(f.frame));
  }

  function drawWires() {
    const wires = layers[1].selectAll("g.wire").data(laid.wires, (w) => w.id).join("g").attr("class", "wire")
      .attr("data-groups", (w) => [...w.groups].join(" "));
    wires.selectAll("*").remove();
    wires.each(function (w) {
      const here = d3.select(this), groups = [...w.groups], line = path(w.points);
      const colour = groups.length ? fx.data.groups[fx.chosenGroup(groups)].colour : null;
      here.append("path").attr("class", `arrow${groups.length ? " carrying" : ""}`).attr("d", line).style("stroke", colour);
      const {x, y} = w.points.at(-1);
      here.append("path").attr("class", "tip").attr("d", `M${x - 5},${y - 8}L${x},${y}L${x + 5},${y - 8}Z`).style("fill", colour);
      here.append("path").attr("class", "hit").attr("d", line);
      const names = groups.slice(0, 6).map((g) => fx.data.groups[g].name);
      here.append("title").text([names.join(", "), w.through && `through ${w.through}`].filter(Boolean).join("\n"));
      here.on("click", () => { if (groups.length) fx.choose({group: fx.chosenGroup(groups)}); })
        .on("mouseenter", () => { if (groups.length) mark(fx.chosenGroup(groups)); }).on("mouseleave", () => mark());
    });
  }

  function stripe(here, item, groups, y) {
    const width = (item.width - 12) / groups.length;
    here.selectAll(null).data(groups).join("rect").attr("class", "stripe").attr("data-group", (g) => g)
      .attr("x", (_, i) => 6 + i * width).attr("y", y).attr("width", width).attr("height", 6).attr("rx", groups.length > 1 ? 0 : 2)
      .attr("fill", paint).on("click", (event, g) => { event.stopPropagation(); fx.choose({group: g, box: item.boxes[0]}); });
  }

  function drawBoxes() {
    const boxes = layers[3].selectAll("g.box").data(laid.items, (item) => item.id).join("g")
      .attr("class", (item) => ["box", item.closed !== undefined && "closed", item.refused.length && "refused"].filter(Boolean).join(" "))
      .attr("data-modules", (item) => item.boxes.flatMap((at) => fx.data.boxes[at].modules).join("\n"))
      .attr("transform", (item) => `translate(${item.x},${item.y})`)
      .attr("aria-label", (item) => `${item.label}, ${item.details}`);
    boxes.selectAll("*").remove();
    boxes.each(function (item) {
      const here = d3.select(this), middle = item.width / 2;
      here.append("rect").attr("class", "body").attr("width", item.width).attr("height", item.height).attr("rx", 6);
      if (item.consumes.length) stripe(here, item, item.consumes.slice(0, 12), 0);
      if (item.holds.length) stripe(here, item, item.holds.slice(0, 12), item.height - 6);
      if (!item.holds.length && item.refused.length) here.append("rect").attr("class", "stripe refused").attr("x", 6)
        .attr("y", item.height - 6).attr("width", item.width - 12).attr("height", 6).attr("fill", "url(#blank)");
      const name = item.closed !== undefined ? `+ ${item.label}` : item.label;
      here.append("text").attr("class", "name").attr("x", middle).attr("y", item.details ? 19 : 20).text(name);
      if (item.details) here.append("text").attr("class", "details").attr("x", middle).attr("y", 33).text(item.details);
      const why = item.refused.map((r) => fx.data.refusals[r].reason);
      here.append("title").text([...fx.data.boxes[item.boxes[0]].modules.slice(0, item.closed !== undefined ? 0 : 9),
        ...why.map((reason) => `not merged: ${reason}`)].join("\n"));
    });
    const act = (event, item) => item.closed !== undefined ? fx.toggle(item.closed) : fx.choose({box: item.boxes[0]});
    boxes.on("click", act).on("mouseenter", (event, item) => { if (item.closed === undefined) mark(fx.groupOf(item.boxes[0])); })
      .on("mouseleave", () => mark());
    key(boxes, act);
  }

  function mark(hovered) { // highlight the members of the group under the pointer, or else of the selected group
    const group = hovered ?? fx.chosen?.group;
    root.classed("dimmed", group !== undefined && group !== null);
    layers[3].selectAll("g.box").classed("on", (item) => item.groups.has(group)).classed("via", (item) => item.via.has(group))
      .classed("sought", (item) => fx.chosen?.box !== undefined && item.boxes.includes(fx.chosen.box));
    layers[1].selectAll("g.wire").classed("on", (w) => w.groups.has(group)).each(function (w) {
      if (!w.groups.size) return;
      const colour = fx.data.groups[w.groups.has(group) ? group : fx.chosenGroup([...w.groups])].colour;
      d3.select(this).select(".arrow").style("stroke", colour);
      d3.select(this).select(".tip").style("fill", colour);
    }).filter((w) => w.groups.has(group)).raise();
  }

  function draw(found) {
    laid = found;
    drawFrames(); drawWires(); drawBoxes(); mark();
    const scale = Math.min(130 / laid.width, (svg.node().getBoundingClientRect().height - 60) / laid.height, 0.3);
    map.attr("width", Math.max(laid.width * scale, 44)).attr("height", laid.height * scale).attr("viewBox", `0 0 ${laid.width} ${laid.height}`);
    still.selectAll("*").remove();
    laid.frames.filter((f) => f.depth === 0).forEach((f) => still.append("rect").attr("x", f.x).attr("y", f.y)
      .attr("width", f.width).attr("height", f.height).style("fill", "var(--frame)").style("stroke", "var(--line)").style("stroke-width", 1 / scale));
    still.selectAll(null).data(laid.wires.filter((w) => w.groups.size)).join("path").attr("d", (w) => path(w.points))
      .style("fill", "none").style("stroke", (w) => fx.data.groups[fx.chosenGroup([...w.groups])].colour).style("stroke-width", 1.6 / scale);
    still.selectAll(null).data(laid.items).join("rect").attr("x", (d) => d.x).attr("y", (d) => d.y).attr("width", (d) => d.width)
      .attr("height", (d) => d.height).style("fill", (d) => d.holds.length ? fx.data.groups[d.holds[0]].colour : "var(--wire)");
    drawWindow();
  }

  function drawWindow() {
    const t = d3.zoomTransform(svg.node()), {width, height} = svg.node().getBoundingClientRect();
    map.select(".window").attr("x", -t.x / t.k).attr("y", -t.y / t.k).attr("width", width / t.k).attr("height", height / t.k);
  }

  function moveTo(x, y, k) { // zoom to scale k with the point (x, y) in the middle of the window
    const {width, height} = svg.node().getBoundingClientRect();
    svg.call(zoom.transform, d3.zoomIdentity.translate(width / 2 - x * k, height / 2 - y * k).scale(k));
  }

  function fit() {
    const {width, height} = svg.node().getBoundingClientRect();
    moveTo(laid.width / 2, laid.height / 2, Math.min(width / laid.width, height / laid.height, 1.2));
  }

  function start() { // show the whole network if it is legible at that scale, else its top
    const {width, height} = svg.node().getBoundingClientRect();
    const whole = Math.min(width / laid.width, height / laid.height, 1.2);
    if (whole >= 0.6) return fit();
    const k = Math.max(0.6, Math.min(1, (width - 150) / laid.width));
    const first = laid.items[0];
    moveTo(laid.width * k <= width ? laid.width / 2 : first.x + first.width / 2, height / 2 / k, k);
  }

  function show(box) {
    const item = laid.items.find((i) => i.boxes.includes(box));
    const k = Math.max(d3.zoomTransform(svg.node()).k, 0.9);
    moveTo(item.x + item.width / 2, item.y + item.height / 2, k);
    return item;
  }

  function focus(id) {
    const node = layers[3].selectAll("g.box").filter((item) => item.id === id).node()
      || layers[2].selectAll("g.title").filter((f) => f.id === id).node();
    if (node) node.focus({preventScroll: true});
  }

  function place(id) {
    return laid.items.find((i) => i.id === id) || laid.frames.find((f) => f.id === id);
  }

  map.on("click", (event) => {
    const [x, y] = d3.pointer(event, map.node());
    moveTo(x, y, d3.zoomTransform(svg.node()).k);
  });

  return {
    draw, mark, fit, start, show, focus, place,
    at: () => d3.zoomTransform(svg.node()),
    keep: (old, id) => { // the frame that was toggled stays under the pointer
      const now = place(id), t = d3.zoomTransform(svg.node());
      if (old && now) svg.call(zoom.transform, d3.zoomIdentity.translate(t.x + (old.x - now.x) * t.k, t.y + (old.y - now.y) * t.k).scale(t.k));
    },
    zoomBy: (factor) => svg.call(zoom.scaleBy, factor),
    panBy: (x, y) => svg.call(zoom.translateBy, x / d3.zoomTransform(svg.node()).k, y / d3.zoomTransform(svg.node()).k),
  };
})();
