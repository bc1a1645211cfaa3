// The visible part of the network: which frames are open, the boxes in place of collapsed ones, and the layout by ELK.
"use strict";
const fx = {data: JSON.parse(document.getElementById("data").textContent)};
fx.frames = new Map(fx.data.frames.map((f, at) => [f.id, {...f, at}]));
fx.open = new Set(fx.data.frames.filter((f) => f.open).map((f) => f.id));
fx.LIMIT = 450; // visible boxes, at most

fx.network = (() => {
  const {boxes, arrows} = fx.data;
  const elk = new ELK();
  const pen = document.createElement("canvas").getContext("2d");
  const children = d3.group(fx.data.frames, (f) => f.parent);
  const inside = d3.rollup(boxes, (all) => all.length, (b) => b.frame);

  function textWidth(text, font) {
    pen.font = font;
    return pen.measureText(text).width;
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

  function expand() { // open one more level of frames, as far as LIMIT allows
    const before = fx.open.size;
    const level = (frame) => (children.get(frame) || []).flatMap((f) => fx.open.has(f.id) ? level(f.id) : [f.id]);
    for (const id of level("")) {
      if (shown() + size(id) - 1 <= fx.LIMIT) fx.open.add(id);
    }
    return fx.open.size > before;
  }

  function details(box) { // the second line of a box
    const width = box.after !== box.before ? `${box.before} → ${box.after}` : box.before ? `${box.before}` : "";
    return [box.op !== box.label && box.op !== box.kind ? box.op : "", width].filter(Boolean).join("  ");
  }

  function short(text, most) {
    return text.length <= most ? text : `${text.slice(0, most / 2)}…${text.slice(-most / 2)}`;
  }

  function view() {
    const items = new Map();
    boxes.forEach((box, at) => {
      const frame = collapsed(box.frame);
      const id = frame === undefined ? `b${at}` : `f${fx.frames.get(frame).at}`;
      if (!items.has(id)) {
        const own = frame === undefined
          ? {label: short(box.label, 34), details: short(details(box), 34), frame: box.frame}
          : {label: short(fx.frames.get(frame).label, 34), closed: frame, frame: fx.frames.get(frame).parent};
        items.set(id, {id, boxes: [], ...own});
      }
      items.get(id).boxes.push(at);
    });
    const home = new Map();
    for (const item of items.values()) {
      item.boxes.forEach((at) => home.set(at, item.id));
      if (item.closed !== undefined) item.details = `${item.boxes.length} boxes, collapsed`;
      const roles = item.boxes.flatMap((at) => boxes[at].roles);
      item.groups = new Set(roles.filter(([, role]) => role !== "pass").map(([group]) => group));
      item.via = new Set(roles.filter(([, role]) => role === "pass").map(([group]) => group));
      item.consumes = [...new Set(roles.filter(([, role]) => role === "consumer").map(([group]) => group))];
      item.holds = [...new Set(roles.filter(([, role]) => role !== "consumer").map(([group]) => group))];
      item.refused = [...new Set(item.boxes.flatMap((at) => boxes[at].refused))];
      item.width = Math.max(84, 26 + textWidth(item.label, "600 12.5px system-ui, DejaVu Sans, sans-serif"),
        22 + textWidth(item.details, "11px system-ui, DejaVu Sans, sans-serif"));
      item.height = item.details ? 44 : 32;
    }
    const wires = new Map();
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
            "elk.nodeSize.minimum": `(${50 + textWidth(f.label, "600 12px system-ui, DejaVu Sans, sans-serif")},40)`},
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

  return {view, layout, ancestors, expand, shown, size};
})();
