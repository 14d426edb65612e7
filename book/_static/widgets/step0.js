// The step-0 bench: start A and B at zero or drawn, freeze one if you like, press Step, and see which moves, and why.
//
// A layer of 3 inputs and 2 outputs at rank 2, one input x, loss = half the squared distance to a target, plain gradient descent.
(() => {
  'use strict';
  const {element, uid} = Course;
  const W = [[0.6, -0.4, 0.2], [-0.3, 0.5, 0.7]];
  const X = [1, -0.5, 2];
  const TARGET = [1, -1];
  const SCALE = 2; // alpha / r
  const RATE = 0.05;
  const DRAWN = {A: [[0.4, -0.3, 0.5], [-0.5, 0.1, 0.3]], B: [[0.5, -0.2], [0.3, 0.6]]};
  const zeros = (m) => m.map((row) => row.map(() => 0));
  const copy = (m) => m.map((row) => [...row]);
  const times = (m, v) => m.map((row) => row.reduce((sum, value, i) => sum + value * v[i], 0));
  const outer = (a, b) => a.map((p) => b.map((q) => p * q));
  const transpose = (m) => m[0].map((_, i) => m.map((row) => row[i]));
  const largest = (m) => Math.max(...m.flat().map(Math.abs));

  function look(A, B) {
    const ax = times(A, X);
    const base = times(W, X);
    const y = base.map((value, i) => value + SCALE * times(B, ax)[i]);
    const g = y.map((value, i) => value - TARGET[i]);
    return {
      loss: 0.5 * g.reduce((sum, value) => sum + value * value, 0),
      atBase: y.every((value, i) => value === base[i]),
      A: outer(times(transpose(B), g), X).map((row) => row.map((value) => SCALE * value)),
      B: outer(g, ax).map((row) => row.map((value) => SCALE * value)),
    };
  }
  function step(A, B, frozen) {
    const slopes = look(A, B);
    const move = (m, name) => m.map((row, i) => row.map((value, j) => (frozen[name] ? value : value - RATE * slopes[name][i][j])));
    return {A: move(A, 'A'), B: move(B, 'B')};
  }
  Course.step0 = {look, step, DRAWN, W, X, TARGET, SCALE, RATE};

  Course.widget('step0', (root) => {
    let now; let count; let said; let losses;
    const start = {A: 'drawn', B: 'zero'};
    const frozen = {A: false, B: false};
    const titleId = uid('step0-title');
    const view = element('div', {class: 'step0-view'});
    const answer = element('p', {class: 'widget-numbers step0-answer', 'aria-live': 'polite'});
    const controls = ['A', 'B'].map((name) => {
      const group = uid(`step0-${name}`);
      const radio = (value) => {
        const input = element('input', {type: 'radio', name: group, value, 'data-factor': name});
        input.checked = start[name] === value;
        input.addEventListener('change', () => { start[name] = value; reset(); });
        return element('label', {}, input, ` ${value}`);
      };
      const freeze = element('input', {type: 'checkbox', 'data-freeze': name});
      freeze.addEventListener('change', () => { frozen[name] = freeze.checked; reset(); });
      return element('fieldset', {class: 'step0-factor'}, element('legend', {text: `${name} starts`}),
        radio('zero'), radio('drawn'), element('label', {}, freeze, ' frozen'));
    });
    const press = element('button', {type: 'button', class: 'widget-button widget-button-main', text: 'Step', onclick: advance});
    const again = element('button', {type: 'button', class: 'widget-button', text: 'Back to step 0', onclick: reset});
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    root.append(element('p', {class: 'widget-title', id: titleId, text: 'The step-0 bench'}),
      element('p', {class: 'widget-note', text: 'One frozen layer, its factors A and B, one input, plain gradient descent. Choose the starts, then press Step.'}),
      element('div', {class: 'step0-controls'}, ...controls), view, element('div', {class: 'widget-buttons'}, press, again), answer);

    const line = (name, m) => element('tr', {}, element('th', {scope: 'row', text: name}),
      element('td', {text: m.map((row) => row.map((value) => value.toFixed(3)).join('  ')).join('\n')}));
    function show() {
      const slopes = look(now.A, now.B);
      view.replaceChildren(element('div', {class: 'table-box', tabindex: '0', role: 'region', 'aria-label': 'The factors and their gradients'},
        element('table', {}, element('tbody', {}, line('A', now.A), line('B', now.B), line('gradient of A', slopes.A), line('gradient of B', slopes.B)))));
      answer.textContent = `Step ${count}: loss ${slopes.loss.toFixed(4)}, output ${slopes.atBase ? 'exactly the base' : 'not the base'}. ${said}`;
      root.dataset.losses = JSON.stringify(losses);
    }
    function why(name, before) {
      const other = name === 'A' ? 'B' : 'A';
      if (frozen[name]) return `${name} stays: it is frozen.`;
      if (largest(look(before.A, before.B)[name]) === 0) return `${name} stays: its gradient contains ${other}, and ${other} is zero.`;
      return `${name} moves: its gradient contains ${other}, which is not zero.`;
    }
    function advance() {
      const before = now;
      now = step(now.A, now.B, frozen);
      count += 1;
      said = `${why('A', before)} ${why('B', before)}`;
      losses.push(look(now.A, now.B).loss);
      show();
    }
    function reset() {
      now = {A: start.A === 'zero' ? zeros(DRAWN.A) : copy(DRAWN.A), B: start.B === 'zero' ? zeros(DRAWN.B) : copy(DRAWN.B)};
      [count, said, losses] = [0, '', [look(now.A, now.B).loss]];
      show();
    }
    reset();
  });
})();
