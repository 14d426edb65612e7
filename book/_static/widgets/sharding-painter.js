// Sharding painter: lay x, W and y = x W over a mesh of eight devices; see who holds what, and the messages that follow.
//
// What a device holds is arithmetic, done here. The messages are not: tools/sharding_cases.py compiled every combination, and
// sharding-painter.json says what XLA put in. config: {mesh?: "4x2", x?, w?, y?: two letters each, of . f t b}.
(() => {
  'use strict';
  const {element, uid} = Course;
  const MESHES = ['8x1', '4x2', '2x4', '1x8'];
  const CHOICES = [['.', 'whole'], ['f', 'fsdp'], ['t', 'tp'], ['b', 'fsdp, tp']];
  const AXES = {'.': [], f: ['fsdp'], t: ['tp'], b: ['fsdp', 'tp']};
  const ARRAYS = [['x', 'batch', 'in'], ['W', 'in', 'out'], ['y', 'batch', 'out']];
  const LAYOUTS = [
    ['data parallel', 'f.', '..', 'f.'],
    ['FSDP', 'f.', 'f.', 'f.'],
    ['tp by columns', 'f.', '.t', 'ft'],
    ['tp by rows', 'ft', 't.', 'f.'],
    ['FSDP and tp, columns', 'f.', 'ft', 'ft'],
    ['FSDP and tp, rows', 'ft', 'tf', 'f.'],
    ['like a gradient', '.f', 'f.', 'f.'],
    ['all on every device', '..', '..', '..'],
  ];
  const number = (n) => n.toLocaleString('en-US');
  const listed = (names) => (names.length < 2 ? names.join('') : `${names.slice(0, -1).join(', ')} and ${names[names.length - 1]}`);

  // [{devices, row, rows, column, columns}]: the blocks of an array, and who has each.
  function parts(spec, mesh) {
    const sizes = {fsdp: mesh[0], tp: mesh[1]};
    const counts = [...spec].map((letter) => AXES[letter].reduce((n, axis) => n * sizes[axis], 1));
    const found = new Map();
    for (let device = 0; device < mesh[0] * mesh[1]; device += 1) {
      const at = {fsdp: Math.floor(device / mesh[1]), tp: device % mesh[1]};
      const [row, column] = [...spec].map((letter) => AXES[letter].reduce((i, axis) => i * sizes[axis] + at[axis], 0));
      const key = `${row},${column}`;
      if (!found.has(key)) found.set(key, {devices: [], row, rows: counts[0], column, columns: counts[1]});
      found.get(key).devices.push(device);
    }
    return [...found.values()];
  }
  // Bytes on a device, and how many devices have each number.
  function held(spec, mesh, shape, itemsize) {
    const blocks = parts(spec, mesh);
    return {bytes: (shape[0] * shape[1] * itemsize) / blocks.length, copies: (mesh[0] * mesh[1]) / blocks.length};
  }
  function outcome(data, meshName, specs) {
    const [x, w, y] = specs.map((spec) => data.specs.indexOf(spec));
    const n = data.specs.length;
    return data.outcomes[data.cases[meshName][(x * n + w) * n + y]];
  }
  // Which dimension of a layout an axis cuts: 0, 1, or -1.
  const cuts = (spec, axis) => [...spec].findIndex((letter) => AXES[letter].includes(axis));

  // Why a message is there, as far as the three layouts say.
  function why([kind, moved, along], specs) {
    const [x, w, y] = specs;
    const axes = along === 'both' ? ['fsdp', 'tp'] : [along];
    const names = listed(axes);
    if (kind === 'collective-permute') return `Blocks of ${moved} change places: the parts have the right size and lie on the wrong devices.`;
    if (kind === 'all-to-all') return `${moved} is cut in another dimension afterwards: each device has a piece for every other.`;
    if (moved === 'y') {
      if (kind === 'all-gather') return `The product comes out cut along ${names}, and y shall be whole there.`;
      const who = axes.every((axis) => cuts(x, axis) === 1 && cuts(w, axis) === 0) ? 'The inner dimension of both is cut' : 'For the product XLA cut the inner dimension';
      const then = axes.every((axis) => cuts(y, axis) !== -1) ? ' Then each keeps its own part of y: a TPU’s compiler can do both at once, as a reduce-scatter.' : '';
      return `${who} along ${names}: each device has part of every sum. They are added.${then}`;
    }
    const [own, other, ownName, otherName] = moved === 'x' ? [x, w, 'x', 'W'] : [w, x, 'W', 'x'];
    const inner = moved === 'x' ? 1 : 0;
    const outer = 1 - inner;
    const reasons = axes.map((axis) => {
      const mine = cuts(own, axis);
      const theirs = cuts(other, axis);
      if (mine === inner && theirs === -1) return `${axis} cuts the inner dimension of ${ownName} and not that of ${otherName}: the parts do not meet.`;
      if (mine === inner && theirs === inner) return `${axis} cuts the inner dimension of ${ownName} and ${moved === 'x' ? 'the columns of W' : 'the batch of x'}: a device has parts that do not meet.`;
      if (mine === inner) return `Both could be multiplied in parts along ${axis} and added; XLA puts ${ownName} together instead.`;
      if (mine === outer && cuts(y, axis) !== outer) return `y is not cut along ${axis} there, so a device needs more of ${ownName} than it has.`;
      if (mine === outer) return `XLA puts ${ownName} together along ${axis} for the product.`;
      return `One step of taking ${ownName} to another layout.`;
    });
    return [...new Set(reasons)].join(' ');
  }
  Course.shardingPainter = {parts, held, outcome, why, LAYOUTS};

  Course.widget('sharding-painter', async (root, config) => {
    const data = await Course.fetchData('sharding-painter-data');
    if (!data) throw new Error('expected the cases of sharding-painter.json, found none: build the site again');
    const {batch, itemsize} = data.shape;
    const shapes = [[batch, data.shape.in], [data.shape.in, data.shape.out], [batch, data.shape.out]];
    let meshName = MESHES.includes(config.mesh) ? config.mesh : '4x2';
    const specs = [config.x || 'f.', config.w || 'f.', config.y || 'f.'];
    const mesh = () => meshName.split('x').map(Number);

    const titleId = uid('painter-title');
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    const said = element('div', {class: 'painter-said', role: 'status', 'aria-live': 'polite'});
    const note = element('p', {class: 'widget-note painter-note', role: 'status', 'aria-live': 'polite'});
    const group = uid('painter-mesh');
    const meshes = element('fieldset', {class: 'painter-meshes'}, element('legend', {text: 'Mesh, fsdp × tp'}),
      ...MESHES.map((name) => {
        const radio = element('input', {type: 'radio', name: group, value: name, checked: name === meshName});
        radio.addEventListener('change', () => { meshName = name; note.textContent = ''; draw(); });
        return element('label', {}, radio, ` ${name.replace('x', ' × ')}`);
      }));
    const presets = element('div', {class: 'widget-buttons', role: 'group', 'aria-label': 'Known layouts'},
      ...LAYOUTS.map(([name, ...layout]) => element('button', {type: 'button', class: 'widget-button', 'data-layout': layout.join(' '), text: name,
        onclick: () => { specs.splice(0, 3, ...layout); note.textContent = ''; draw(); }})));
    const views = ARRAYS.map(([name, ...dimensions], which) => {
      const selects = dimensions.map((dimension, i) => {
        const id = uid('painter-select');
        const select = element('select', {id, 'data-dimension': `${name}.${dimension}`}, ...CHOICES.map(([letter, text]) => element('option', {value: letter, text})));
        select.addEventListener('change', () => choose(which, i, select.value));
        return {select, row: element('div', {class: 'painter-dimension'}, element('label', {for: id, text: `${dimension} (${shapes[which][i]})`}), select)};
      });
      const picture = element('div', {class: 'painter-picture'});
      const numbers = element('p', {class: 'painter-numbers'});
      const box = element('section', {class: 'painter-array', 'aria-label': `${name}: ${dimensions.join(' by ')}`},
        element('p', {class: 'painter-name', text: `${name} [${dimensions.join(', ')}]`}), ...selects.map(({row}) => row), picture, numbers);
      return {name, dimensions, selects, picture, numbers, box};
    });
    root.append(element('p', {class: 'widget-title', id: titleId, text: 'Sharding painter: y = x W on eight devices'}),
      element('p', {class: 'widget-note', text: 'Choose what cuts each dimension. Numbers in the pictures are devices; a block with several is copied.'}),
      meshes, presets, element('div', {class: 'painter-arrays'}, ...views.map(({box}) => box)), note,
      element('p', {class: 'painter-step', text: 'Messages that XLA puts in'}), said,
      element('p', {class: 'widget-note', text: 'Bytes: float32, on one device; of a message, its result. Where several ways lead to the same y, this is the one that this compiler took. '
        + Object.entries(data.provenance).map(([key, what]) => `${key.replaceAll('_', ' ')}: ${what}`).join(' · ')}));

    function choose(which, dimension, letter) {
      const letters = [...specs[which]];
      letters[dimension] = letter;
      const other = 1 - dimension;
      const twice = AXES[letter].filter((axis) => AXES[letters[other]].includes(axis));
      note.textContent = '';
      if (twice.length) {
        const left = AXES[letters[other]].filter((axis) => !twice.includes(axis));
        letters[other] = left.length ? left[0][0] : '.';
        note.textContent = `One axis cuts one dimension of an array: ${views[which].dimensions[other]} of ${views[which].name} is no longer cut along ${listed(twice)}.`;
      }
      specs[which] = letters.join('');
      draw();
    }
    function picture(view, which) {
      const [width, height] = [168, 120];
      const blocks = parts(specs[which], mesh());
      const label = blocks.map((b) => `row block ${b.row + 1} of ${b.rows}, column block ${b.column + 1} of ${b.columns}: device ${listed(b.devices.map(String))}`).join('; ');
      const svg = element('svg', {viewBox: `-1 -1 ${width + 2} ${height + 2}`, role: 'img', 'aria-label': `${view.name}: ${label}`});
      for (const b of blocks) {
        const [w, h] = [width / b.columns, height / b.rows];
        svg.append(element('rect', {x: b.column * w, y: b.row * h, width: w, height: h, class: (b.row + b.column) % 2 ? 'painter-odd' : 'painter-even'}),
          element('text', {x: (b.column + 0.5) * w, y: (b.row + 0.5) * h, text: b.devices.length === 8 ? '0 … 7' : b.devices.join(', ')}));
      }
      return svg;
    }
    function draw() {
      views.forEach((view, which) => {
        view.selects.forEach(({select}, i) => { select.value = specs[which][i]; });
        view.picture.replaceChildren(picture(view, which));
        const {bytes, copies} = held(specs[which], mesh(), shapes[which], itemsize);
        view.numbers.textContent = `${number(bytes)} bytes a device, ${copies === 1 ? 'no copies' : `${copies} copies of each`}`;
        root.dataset[`bytes${view.name.toUpperCase()}`] = String(bytes);
      });
      const found = outcome(data, meshName, specs);
      root.dataset.messages = JSON.stringify(found);
      for (const button of presets.children) button.setAttribute('aria-pressed', String(button.dataset.layout === specs.join(' ')));
      if (!found.length) {
        said.replaceChildren(element('p', {text: 'None. Every device can make its part of y from what it holds.'}));
        return;
      }
      const total = found.reduce((sum, message) => sum + message[3], 0);
      said.replaceChildren(element('ol', {class: 'painter-messages'}, ...found.map((message) => {
        const [kind, moved, along, bytes] = message;
        const what = moved === 'y' && kind !== 'all-gather' ? 'parts of y' : moved;
        return element('li', {}, element('b', {text: `${kind} of ${what} along ${along === 'both' ? 'both axes' : along}`}), `: ${number(bytes)} bytes. `,
          element('span', {class: 'painter-why', text: why(message, specs)}));
      })), ...(found.length > 1 ? [element('p', {text: `Together ${number(total)} bytes.`})] : []));
    }
    draw();
  });
})();
