// What is left of a recorded change at rank r, beside the loss there.
//
// The numbers lie in the notebook's outputs: <script type="application/json" data-rank-slider="NAME">, written by
// utils.plot.widget_data("rank-slider", NAME, {title, u, v, share, ranks, loss, base, tuned}): u is [rows, all ranks] with the
// singular values in it, v is [columns, all ranks]; the change at rank r is u[:, :r] times v[:, :r] transposed.
(() => {
  'use strict';
  const {element, uid} = Course;

  function product(u, v, r) {
    return u.map((row) => v.map((column) => {
      let sum = 0;
      for (let i = 0; i < r; i += 1) sum += row[i] * column[i];
      return sum;
    }));
  }
  // The loss at r: measured at some ranks, straight between them in log r.
  function lossAt(ranks, loss, r) {
    let i = 0;
    while (i < ranks.length - 1 && ranks[i + 1] < r) i += 1;
    if (i === ranks.length - 1 || ranks[i] === r) return {value: loss[i], measured: ranks[i] === r};
    if (ranks[i + 1] === r) return {value: loss[i + 1], measured: true};
    const x = (n) => Math.log(Math.max(n, 0.5));
    const t = (x(r) - x(ranks[i])) / (x(ranks[i + 1]) - x(ranks[i]));
    return {value: loss[i] + t * (loss[i + 1] - loss[i]), measured: false};
  }
  Course.rankSlider = {product, lossAt};

  Course.widget('rank-slider', (root) => {
    const script = [...document.querySelectorAll('script[data-rank-slider]')].find((s) => s.dataset.rankSlider === root.dataset.name);
    if (!script) {
      root.append(element('p', {class: 'widget-numbers', text: 'This page has no recorded change yet.'}));
      return;
    }
    const recorded = JSON.parse(script.textContent);
    const most = recorded.share.length;
    const full = product(recorded.u, recorded.v, most);
    const top = Math.max(...full.flat().map(Math.abs));
    const titleId = uid('rank-title');
    const id = uid('rank-slider');
    const input = element('input', {type: 'range', id, min: 0, max: most, step: 1});
    input.value = '8';
    const shown = element('output', {for: id});
    const answer = element('p', {class: 'widget-numbers', 'aria-live': 'polite'});
    const [rows, columns] = [full.length, full[0].length];
    const picture = (label) => {
      const cells = full.map((row, i) => row.map((_, j) => element('rect', {x: j, y: i, width: 1.02, height: 1.02})));
      const svg = element('svg', {viewBox: `0 0 ${columns} ${rows}`, class: 'rank-picture', role: 'img', 'aria-label': label}, ...cells.flat());
      return {cells, node: element('figure', {}, svg, element('figcaption', {text: label}))};
    };
    const paint = (cells, m) => m.forEach((row, i) => row.forEach((value, j) => {
      const share = Math.max(-1, Math.min(1, value / top));
      cells[i][j].setAttribute('fill', share < 0 ? '#2563a8' : '#c2570c');
      cells[i][j].setAttribute('fill-opacity', Math.sqrt(Math.abs(share)).toFixed(2));
    }));
    const kept = picture('what rank r keeps');
    const whole = picture('the whole change');
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    root.append(element('p', {class: 'widget-title', id: titleId, text: recorded.title || 'What is left at rank r'}),
      element('div', {class: 'lora-sliders'}, element('label', {for: id, text: 'rank r'}), input, shown),
      element('div', {class: 'rank-pictures'}, kept.node, whole.node), answer);
    paint(whole.cells, full);

    function show() {
      const r = Number(input.value);
      shown.textContent = String(r);
      paint(kept.cells, product(recorded.u, recorded.v, r));
      const share = r ? recorded.share[r - 1] : 0;
      const loss = lossAt(recorded.ranks, recorded.loss, r);
      answer.textContent = `Rank ${r}: ${(100 * share).toFixed(0)}% of this matrix's squared change. With every matrix cut to rank ${r}, the loss is `
        + `${loss.value.toFixed(3)}${loss.measured ? '' : ' (between two measured ranks)'}; base ${recorded.base.toFixed(3)}, fully tuned ${recorded.tuned.toFixed(3)}.`;
    }
    input.addEventListener('input', show);
    show();
  });
})();
