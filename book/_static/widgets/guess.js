// "Draw your guess": say what curve you expect, then see the recorded one.
//
// config: {title, x: {label, min, max, scale?}, y: {…}, handles?, start?, choices?: [{label, points: [[x, y], …]}]}
// The recorded curve lies in the notebook's outputs: <script type="application/json" data-guess="NAME">{label, x, y}</script>,
// written by utils.course.plot.guess_data(NAME, x, y). It is drawn only after a guess.
(() => {
  'use strict';
  const {element, uid} = Course;
  const DASHES = ['7 4', '2 3', '10 3 2 3', '1 5'];
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  function axis(spec, name) {
    const log = spec.scale === 'log';
    if (!(spec.max > spec.min) || (log && spec.min <= 0)) throw new Error(`${name}: expected min < max (above 0 on a log scale)`);
    const f = log ? Math.log : (v) => v;
    const g = log ? Math.exp : (v) => v;
    const [low, high] = [f(spec.min), f(spec.max)];
    return {
      label: spec.label || '',
      min: spec.min,
      max: spec.max,
      log,
      to: (value) => (f(Math.max(value, log ? spec.min : -Infinity)) - low) / (high - low),
      from: (share) => g(low + share * (high - low)),
      ticks(count) {
        if (log) {
          // Powers of ten; with few of them in range, 1, 2 and 5 times each.
          const wide = Math.log10(spec.max / spec.min) >= 2.5;
          const found = [];
          for (let p = Math.floor(Math.log10(spec.min)); p <= Math.log10(spec.max); p += 1) {
            for (const m of wide ? [1] : [1, 2, 5]) {
              const t = m * 10 ** p;
              if (t >= spec.min * (1 - 1e-9) && t <= spec.max * (1 + 1e-9)) found.push(t);
            }
          }
          return found;
        }
        const raw = (spec.max - spec.min) / count;
        const unit = 10 ** Math.floor(Math.log10(raw));
        const step = unit * [1, 2, 5, 10].find((m) => m * unit >= raw);
        const ticks = [];
        for (let t = Math.ceil(spec.min / step - 1e-9) * step; t <= spec.max + step * 1e-9; t += step) ticks.push(t);
        return ticks;
      },
    };
  }

  function format(value) {
    if (value === 0) return '0';
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace('e+', 'e');
    if (size >= 100) return Math.round(value).toLocaleString('en');
    return String(Number(value.toPrecision(3)));
  }

  // The height of a polyline at x, straight between its points in the drawn scales.
  function heightAt(points, x, X, Y) {
    const u = X.to(x);
    const shares = points.map(([px, py]) => [X.to(px), Y.to(py)]);
    if (u <= shares[0][0]) return shares[0][1];
    for (let i = 1; i < shares.length; i += 1) {
      const [[u0, v0], [u1, v1]] = [shares[i - 1], shares[i]];
      if (u <= u1) return u1 === u0 ? v1 : v0 + ((v1 - v0) * (u - u0)) / (u1 - u0);
    }
    return shares[shares.length - 1][1];
  }

  function recordedCurve(name, X) {
    const script = [...document.querySelectorAll('script[data-guess]')].find((s) => s.dataset.guess === name);
    if (!script) return null;
    const {label, x, y} = JSON.parse(script.textContent);
    const points = x.map((value, i) => [value, y[i]]).filter(([px]) => px >= X.min && px <= X.max);
    return points.length ? {label, points} : null;
  }

  Course.widget('guess', (root, config) => {
    const X = axis(config.x, 'x');
    const Y = axis(config.y, 'y');
    const choices = config.choices || null;
    const recorded = recordedCurve(root.dataset.name, X);
    const count = clamp(config.handles || 7, 3, 15);
    const startShare = config.start === undefined ? 0.5 : clamp(Y.to(config.start), 0, 1);
    let heights; let picked; let touched; let shown; let width;

    const titleId = uid('guess-title');
    const plot = element('div', {class: 'guess-plot'});
    const answer = element('p', {class: 'widget-numbers guess-answer', 'aria-live': 'polite'});
    const reveal = element('button', {type: 'button', class: 'widget-button widget-button-main', text: 'Show the recorded curve'});
    const again = element('button', {type: 'button', class: 'widget-button', text: 'Start again'});
    const help = choices ? 'Pick one, then look.'
      : 'Drag the points, or drag across the plot. Keyboard: Tab to a point, arrow keys move it, Page Up and Page Down move it far.';
    const list = choices && element('fieldset', {class: 'guess-choices'},
      element('legend', {class: 'visually-hidden', text: 'Curves to pick from'}),
      ...choices.map((choice, i) => {
        const radio = element('input', {type: 'radio', name: titleId, value: String(i), onchange: () => { picked = i; touched = true; refresh(); }});
        return element('label', {class: `guess-choice guess-color-${i}`}, radio,
          element('b', {text: String.fromCharCode(65 + i)}), ` ${choice.label}`);
      }));
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    root.append(element('p', {class: 'widget-title', id: titleId, text: config.title || 'Draw your guess'}),
      element('p', {class: 'widget-note', text: help}));
    if (list) root.append(list);
    root.append(plot, element('div', {class: 'widget-buttons'}, reveal, again), answer);

    const xs = Array.from({length: count}, (_, i) => X.from(i / (count - 1)));
    const sketch = () => heights.map((share, i) => [xs[i], Y.from(share)]);

    let box; let handles = []; let line;
    const px = (share) => box.left + share * (box.right - box.left);
    const py = (share) => box.bottom - share * (box.bottom - box.top);
    const path = (points) => points.map(([x, y], i) => `${i ? 'L' : 'M'}${px(X.to(x)).toFixed(1)} ${py(clamp(Y.to(y), -0.02, 1.02)).toFixed(1)}`).join('');

    function place(i) {
      const handle = handles[i];
      handle.setAttribute('transform', `translate(${px(i / (count - 1))} ${py(heights[i])})`);
      const value = Y.from(heights[i]);
      handle.setAttribute('aria-valuenow', String(Number(value.toPrecision(4))));
      handle.setAttribute('aria-valuetext', `${format(value)} at ${X.label} ${format(xs[i])}`);
      line.setAttribute('d', path(sketch()));
    }

    function move(i, share) {
      if (shown) return;
      heights[i] = clamp(share, 0, 1);
      touched = true;
      place(i);
      buttons();
    }

    function onKey(event, i) {
      const steps = {ArrowUp: 0.02, ArrowRight: 0.02, ArrowDown: -0.02, ArrowLeft: -0.02, PageUp: 0.1, PageDown: -0.1};
      if (event.key in steps) move(i, heights[i] + steps[event.key]);
      else if (event.key === 'Home') move(i, 0);
      else if (event.key === 'End') move(i, 1);
      else return;
      event.preventDefault();
    }

    function draw() {
      width = Math.max(260, plot.clientWidth);
      const height = Math.round(clamp(width * 0.52, 220, 340));
      box = {left: 58, right: width - 16, top: 14, bottom: height - 44};
      const svg = element('svg', {width, height, viewBox: `0 0 ${width} ${height}`, class: 'guess-svg',
        role: 'group', 'aria-label': `${Y.label} against ${X.label}`});
      let free = -Infinity; // labels that would touch the one before are left out
      for (const t of X.ticks(width < 420 ? 4 : 6)) {
        svg.append(element('line', {class: 'guess-grid', x1: px(X.to(t)), x2: px(X.to(t)), y1: box.top, y2: box.bottom}),
          element('text', {class: 'guess-tick', x: px(X.to(t)), y: box.bottom + 18, 'text-anchor': px(X.to(t)) > box.right - 8 ? 'end' : 'middle', // the last label stays inside
            text: px(X.to(t)) < free ? '' : format(t)}));
        if (px(X.to(t)) >= free) free = px(X.to(t)) + 30 + 4 * format(t).length;
      }
      for (const t of Y.ticks(5)) {
        svg.append(element('line', {class: 'guess-grid', x1: box.left, x2: box.right, y1: py(Y.to(t)), y2: py(Y.to(t))}),
          element('text', {class: 'guess-tick', x: box.left - 12, y: py(Y.to(t)) + 4, 'text-anchor': 'end', text: format(t)}));
      }
      svg.append(element('text', {class: 'guess-axis', x: (box.left + box.right) / 2, y: height - 8, 'text-anchor': 'middle', text: X.label}),
        element('text', {class: 'guess-axis', x: 0, y: 0, transform: `translate(13 ${(box.top + box.bottom) / 2}) rotate(-90)`,
          'text-anchor': 'middle', text: Y.label}));
      if (shown && recorded) {
        svg.append(element('path', {class: 'guess-recorded', d: path(recorded.points), role: 'img',
          'aria-label': recorded.label || 'the recorded curve'}));
      }
      handles = [];
      if (choices) {
        choices.forEach((choice, i) => {
          const [x, y] = choice.points[choice.points.length - 1];
          svg.append(element('path', {class: `guess-line guess-color-${i}${picked === i ? ' guess-picked' : ''}`,
            'stroke-dasharray': DASHES[i % DASHES.length], d: path(choice.points)}),
          element('text', {class: `guess-letter guess-color-${i}`, x: Math.min(px(X.to(x)), box.right - 4),
            y: py(Y.to(y)) - 6, 'text-anchor': 'end', text: String.fromCharCode(65 + i)}));
        });
      } else {
        line = element('path', {class: 'guess-line guess-sketch', 'stroke-dasharray': DASHES[0]});
        svg.append(line);
        for (let i = 0; i < count; i += 1) {
          const handle = element('g', {class: 'guess-handle', role: 'slider', tabindex: shown ? null : '0',
            'aria-label': `Point ${i + 1} of ${count}`, 'aria-valuemin': Y.min, 'aria-valuemax': Y.max,
            'aria-orientation': 'vertical', 'aria-disabled': shown ? 'true' : null, onkeydown: (event) => onKey(event, i)},
          element('circle', {class: 'guess-halo', r: 15}), element('circle', {class: 'guess-dot', r: 6}));
          handles.push(handle);
          svg.append(handle);
        }
        let dragging = false;
        const drag = (event) => {
          const area = svg.getBoundingClientRect();
          const u = (event.clientX - area.left - box.left) / (box.right - box.left);
          const v = (box.bottom - (event.clientY - area.top)) / (box.bottom - box.top);
          move(clamp(Math.round(u * (count - 1)), 0, count - 1), v);
        };
        svg.addEventListener('pointerdown', (event) => {
          if (shown) return;
          dragging = true;
          svg.setPointerCapture(event.pointerId);
          drag(event);
        });
        svg.addEventListener('pointermove', (event) => { if (dragging) drag(event); });
        svg.addEventListener('pointerup', () => { dragging = false; });
        svg.addEventListener('pointercancel', () => { dragging = false; });
      }
      plot.replaceChildren(svg);
      handles.forEach((_, i) => place(i));
    }

    function buttons() {
      reveal.disabled = !recorded || !touched || shown;
      again.disabled = !touched && !shown;
    }

    function refresh() { draw(); buttons(); }

    // Mean distance from the recorded curve, as a share of the plot's height.
    function distance(points) {
      const total = recorded.points.reduce((sum, [x, y]) => sum + Math.abs(heightAt(points, x, X, Y) - Y.to(y)), 0);
      return total / recorded.points.length;
    }

    function report() {
      const [[x0, y0], [x1, y1]] = [recorded.points[0], recorded.points[recorded.points.length - 1]];
      let text = `${recorded.label || 'Recorded'}: ${format(y0)} at ${format(x0)}, ${format(y1)} at ${format(x1)}. `;
      if (choices) {
        const order = choices.map((choice, i) => [distance(choice.points), i]).sort((a, b) => a[0] - b[0]);
        const best = order[0][1];
        const name = String.fromCharCode(65 + best);
        text += best === picked ? `Of the curves offered, yours (${name}) is the closest.` : `The closest of the curves offered is ${name}.`;
      } else {
        const guess = sketch();
        const end = Y.from(clamp(heightAt(guess, x1, X, Y), 0, 1));
        text += `You drew ${format(end)} at ${format(x1)}; on average your curve is ${(100 * distance(guess)).toFixed(0)}% of the plot's height away.`;
      }
      return text;
    }

    function reset() {
      heights = Array(count).fill(startShare);
      [picked, touched, shown] = [null, false, false];
      if (list) list.querySelectorAll('input').forEach((radio) => { radio.checked = false; });
      answer.textContent = recorded ? '' : 'This page has no recorded curve yet.';
      refresh();
    }
    reveal.addEventListener('click', () => {
      shown = true;
      refresh();
      answer.textContent = report();
      again.focus();
    });
    again.addEventListener('click', () => { reset(); });
    reset();
    new ResizeObserver(() => { if (Math.abs(Math.max(260, plot.clientWidth) - width) > 1) draw(); }).observe(plot);
  });
})();
