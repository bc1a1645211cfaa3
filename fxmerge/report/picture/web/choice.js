// What is selected, and what is open: choosing a group or a layer, the page's address, expanding and collapsing.
"use strict";
fx.chosen = null;
fx.helped = new Set(); // frames that were opened to show a choice; the next choice closes them
fx.ROOM = 16; // boxes that choosing a group adds to the drawing, at most, so that it stays legible
fx.turn = 0; // counts layouts, so that a slow one does not undo a later one

fx.say = (words) => d3.select("#status").text(words);

fx.chosenGroup = (groups) => {
  if (groups.includes(fx.chosen?.group)) return fx.chosen.group;
  return groups.find((g) => fx.data.groups[g].shared) ?? groups[0];
};

fx.groupOf = (box) => {
  const roles = fx.data.boxes[box].roles;
  const first = (...kinds) => kinds.map((kind) => roles.find(([, role]) => role === kind)).find(Boolean);
  return first("producer", "tie", "per_channel_param", "mixer", "consumer", "pass")?.[0];
};

fx.choose = (what, fromPanel) => {
  fx.chosen = what && {...what, group: what.group ?? (what.box !== undefined ? fx.groupOf(what.box) : undefined)};
  fx.panel.show(fx.chosen);
  fx.scene.mark();
  fx.address.write(fx.chosen);
  if (!fromPanel) return;
  const panel = document.getElementById("panel");
  panel.focus({preventScroll: true});
  if (window.matchMedia("(max-width: 800px)").matches) panel.scrollIntoView(); // there the whole page scrolls, not the panel
};

fx.address = (() => { // page.html#layer1.0.conv1 for a layer, page.html#group:layer1.0.conv1 for a group
  const GROUP = "group:";
  let written = null;

  function write(chosen) {
    const box = fx.data.boxes[chosen?.box];
    const name = !chosen ? "" : box ? box.modules[0] : GROUP + fx.data.groups[chosen.group].name;
    written = name ? `#${encodeURIComponent(name).replaceAll("%3A", ":")}` : "";
    if (location.hash === written) return;
    try { location.hash = written; } catch { /* a page inside another one may not change its address */ }
  }

  function read() {
    if (location.hash === written) return;
    written = location.hash;
    let name = location.hash.slice(1);
    try { name = decodeURIComponent(name); } catch { /* a "%" that is not part of a code */ }
    if (!name) return fx.choose(null);
    const at = name.startsWith(GROUP) ? fx.data.groups.findIndex((g) => g.name === name.slice(GROUP.length)) : -1;
    return at >= 0 ? fx.goGroup(at) : fx.find(name);
  }

  return {write, read};
})();

fx.lay = async () => {
  const turn = ++fx.turn;
  fx.say("computing the layout …");
  await new Promise((done) => setTimeout(done, 15)); // lets the browser show the status first
  const found = await fx.network.layout(fx.network.view());
  if (turn !== fx.turn) return false;
  fx.scene.draw(found);
  fx.say("");
  return true;
};

fx.members = (at) => d3.range(fx.data.boxes.length)
  .filter((b) => fx.data.boxes[b].roles.some(([g, role]) => g === at && role !== "pass"));

fx.reveal = async (boxes, room = Infinity) => { // open the frames around some boxes; close those of an earlier choice
  const paths = boxes.map((at) => fx.network.ancestors(fx.data.boxes[at].frame)), needed = new Set(paths.flat());
  const before = [...fx.open].sort().join();
  fx.helped.forEach((f) => { if (!needed.has(f)) { fx.open.delete(f); fx.helped.delete(f); } });
  const seen = fx.network.shown();
  let isWhole = true;
  for (let depth = 0; depth < d3.max(paths, (path) => path.length); depth++) { // whole levels, the outermost first
    const level = [...new Set(paths.map((path) => path[depth]))].filter((f) => f !== undefined && !fx.open.has(f));
    if (fx.network.shown() + d3.sum(level, (f) => fx.network.size(f) - 1) - seen > room) break;
    for (const frame of level) {
      if (!fx.network.fits(frame)) { isWhole = false; continue; }
      fx.open.add(frame);
      fx.helped.add(frame);
    }
  }
  const isLaid = before === [...fx.open].sort().join() || await fx.lay();
  if (isLaid && !isWhole) fx.say("some modules stay closed: there are too many layers to show");
  return isLaid;
};

fx.goGroup = async (at, fromPanel, room = fx.ROOM) => { // select a group and show all of its members
  if (!await fx.reveal(fx.members(at), room)) return;
  fx.choose({group: at}, fromPanel);
  fx.camera.showAll(fx.scene.laid.items.filter((item) => item.groups.has(at)));
};

fx.go = async (box, fromPanel) => { // select a layer and show it
  if (!await fx.reveal([box])) return;
  fx.camera.show(box);
  fx.choose({box}, fromPanel);
};

fx.find = (name) => {
  const at = fx.data.boxes.findIndex((b) => b.modules.includes(name) || b.label === name);
  if (at >= 0) return fx.go(at);
};

fx.toggle = async (frame) => {
  const id = `f${fx.frames.get(frame).at}`, old = fx.scene.place(id), isOpening = !fx.open.has(frame);
  if (isOpening && !fx.network.fits(frame)) return fx.say("too many layers are visible; collapse some modules first");
  if (isOpening) fx.open.add(frame); else fx.open.delete(frame);
  fx.helped.delete(frame);
  if (!await fx.lay()) return;
  fx.camera.keep(old, id);
  fx.scene.focus(id);
};

fx.collapse = async () => { fx.open.clear(); fx.helped.clear(); if (await fx.lay()) fx.camera.start(); };
fx.expand = async () => { if (fx.network.expand() && await fx.lay()) fx.camera.start(); };
