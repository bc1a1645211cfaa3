// The visible part of the network: which frames are open, the boxes in place of collapsed ones, and the layout by ELK.
"use strict";
fx.frames = new Map(fx.data.frames.map((f, at) => [f.id, {...f, at}]));
fx.open = new Set(fx.data.frames.filter((f) => f.open).map((f) => f.id));
fx.LIMIT = 450; // visible boxes, at most

fx.network = (() => {
  const {boxes, arrows} = fx.data, {text} = fx;
  const elk = new ELK();
  const pen = document.createElement("canvas").getContext("2d");
  const children = d3.group(fx.data.frames, (f) => f.parent);
  const inside = d3.rollup(boxes, (all) => all.length, (b) => b.frame);
  const FAMILY = "system-ui, DejaVu Sans, sans-serif";
  const FONT = {name: `600 12.5px ${FAMILY}`, details: `11px ${FAMILY}`, title: `600 12px ${FAMILY}`};
  const BAR = 40; // a bar and the gap after it

  function textWidth(words, font) {
    pen.font = font;
    return pen.measureText(words).width;
  }

  function size(frame) {
    return (inside.get(frame) || 0) + (children.get(frame) || []).length;
  }

  function ancestors(frame) {
    const found = [];
    for (let f = frame; f; f = fx.frames.get(f).parent) found.unshift(f);
    return found;
  }

  function collapsed(frame) { // the outermost collapsed frame around a frame, or undefined
    return ancestors(frame).find((f) => !fx.open.has(f));
  }

  function shown() {
    let seen = size("");
    const walk = (frame) => (children.get(frame) || []).forEach((f) => {
      if (fx.open.has(f.id)) { seen += size(f.id) - 1; walk(f.id); }
    });
    walk("");
    return seen;
  }

  function fits(frame) { // may it be opened without showing more than LIMIT boxes?
    return shown() + size(frame) - 1 <= fx.LIMIT;
  }

  function expand() { // open one more level of frames, as far as LIMIT allows
    const before = fx.open.size;
    const level = (frame) => (children.get(frame) || []).flatMap((f) => fx.open.has(f.id) ? level(f.id) : [f.id]);
    for (const id of level("")) if (fits(id)) fx.open.add(id);
    return fx.open.size > before;
  }

  function figures(item) { // the last line of a box, {words, share of the bar}, for each choice of colours
    const first = boxes[item.boxes[0]], costs = fx.measure.total(item.boxes, "parameters"), [before, after] = costs;
    const saving = before > 0 ? {words: text.costs(costs), share: Number.isFinite(after) ? after / before : undefined} : {words: ""};
    const loss = d3.max(item.boxes, (at) => fx.measure.boxLoss[at]);
    const width = {words: first.before ? `${text.change(first.before, first.after)}${first.after === first.before ? " channels" : ""}` : "",
      share: first.after !== first.before ? first.after / first.before : undefined};
    return {
      group: item.closed === undefined ? width : {...saving, words: saving.words && `${saving.words} parameters`},
      saving: fx.merged ? saving : {words: ""},
      error: Number.isFinite(loss) ? {words: `${fx.measure.lossName} ${text.error(loss)}`, share: loss / fx.measure.mostLoss} : {words: ""},
    };
  }

  function describe(item) { // what a box says, and its size
    const roles = item.boxes.flatMap((at) => boxes[at].roles), groups = (keep) => [...new Set(roles.filter(([, role]) => keep(role)).map(([g]) => g))];
    const first = boxes[item.boxes[0]], weighted = item.boxes.filter((at) => boxes[at].parameters[0] > 0).length;
    if (item.closed !== undefined) {
      item.label = text.cut(fx.frames.get(item.closed).label, 34);
      item.details = weighted ? text.counted(weighted, "layer") : text.counted(item.boxes.length, "operation");
    } else {
      item.label = text.cut(first.label, 34);
      item.details = first.op !== first.label && first.op !== first.kind ? text.cut(first.op, 34) : "";
    }
    item.groups = new Set(groups((role) => role !== "pass"));
    item.via = new Set(groups((role) => role === "pass"));
    item.consumes = groups((role) => role === "consumer");
    item.holds = groups((role) => role !== "consumer");
    item.refused = [...new Set(item.boxes.flatMap((at) => boxes[at].refused))];
    item.figures = figures(item);
    for (const f of Object.values(item.figures)) f.width = textWidth(f.words, FONT.details);
    const said = Object.values(item.figures).filter((f) => f.words);
    item.width = Math.ceil(Math.max(84, 34 + textWidth(item.label, FONT.name), 22 + textWidth(item.details, FONT.details),
      ...said.map((f) => 22 + f.width + (f.share === undefined ? 0 : BAR))));
    item.height = 31 + 15 * Boolean(item.details) + 15 * Boolean(said.length);
    return item;
  }

  function view() {
    const items = new Map(), home = new Map(), wires = new Map();
    boxes.forEach((box, at) => {
      const frame = collapsed(box.frame);
      const id = frame === undefined ? `b${at}` : `f${fx.frames.get(frame).at}`;
      if (!items.has(id)) items.set(id, {id, boxes: [], closed: frame, frame: frame === undefined ? box.frame : fx.frames.get(frame).parent});
      items.get(id).boxes.push(at);
      home.set(at, id);
    });
    items.forEach(describe);
    for (const [source, target, groups, through] of arrows) {
      const ends = [home.get(source), home.get(target)];
      if (ends[0] === ends[1]) continue;
      const key = ends.join(" ");
      if (!wires.has(key)) wires.set(key, {id: `w${wires.size}`, source: ends[0], target: ends[1], groups: new Set(), through});
      groups.forEach((g) => wires.get(key).groups.add(g));
    }
    return {items: [...items.values()], wires: [...wires.values()]};
  }

  async function layout({items, wires}) {
    const within = d3.group(items, (item) => item.frame);
    const contents = (frame) => [
      ...(within.get(frame) || []).map((item) => ({id: item.id, width: item.width, height: item.height, first: item.boxes[0]})),
      ...(children.get(frame) || []).filter((f) => fx.open.has(f.id)).map((f) => {
        const inner = contents(f.id);
        return {
          id: `f${fx.frames.get(f.id).at}`, frame: f.id, children: inner, first: d3.min(inner, (c) => c.first),
          layoutOptions: {"elk.padding": "[top=34,left=14,bottom=14,right=14]",
            "elk.nodeSize.constraints": "MINIMUM_SIZE",
            "elk.nodeSize.minimum": `(${50 + textWidth(f.label, FONT.title)},40)`},
        };
      }),
    ].sort((one, other) => one.first - other.first);
    const graph = {
      id: "root", children: contents(""),
      edges: wires.map((w) => ({id: w.id, sources: [w.source], targets: [w.target]})),
      layoutOptions: {
        "elk.algorithm": "layered", "elk.direction": "DOWN", "elk.hierarchyHandling": "INCLUDE_CHILDREN",
        "elk.edgeRouting": "ORTHOGONAL", "elk.json.shapeCoords": "ROOT", "elk.json.edgeCoords": "ROOT",
        "elk.layered.considerModelOrder.strategy": "PREFER_EDGES",
        "elk.layered.nodePlacement.strategy": "BRANDES_KOEPF", "elk.layered.nodePlacement.bk.fixedAlignment": "BALANCED",
        "elk.spacing.nodeNode": "26", "elk.spacing.edgeNode": "16", "elk.spacing.edgeEdge": "10",
        "elk.layered.spacing.nodeNodeBetweenLayers": "30", "elk.layered.spacing.edgeNodeBetweenLayers": "12",
        "elk.padding": "[top=20,left=20,bottom=20,right=20]",
      },
    };
    const laid = await elk.layout(graph);
    const places = new Map(), frames = [];
    const walk = (node, depth) => (node.children || []).forEach((child) => {
      places.set(child.id, child);
      if (child.frame !== undefined) { frames.push({...child, depth}); walk(child, depth + 1); }
    });
    walk(laid, 0);
    const bends = new Map(laid.edges.map((e) => [e.id, e.sections[0]]));
    items.forEach((item) => Object.assign(item, {x: places.get(item.id).x, y: places.get(item.id).y}));
    wires.forEach((w) => {
      const s = bends.get(w.id);
      w.points = [s.startPoint, ...(s.bendPoints || []), s.endPoint];
    });
    return {items, wires, frames, width: laid.width, height: laid.height};
  }

  return {BAR, view, layout, ancestors, collapsed, expand, shown, size, fits};
})();
