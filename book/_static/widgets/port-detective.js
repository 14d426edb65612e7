// Port detective: a port with one hidden bug, a few points to spend on probes, a list of suspects.
//
// Every reading was measured by tools/port_symptoms.py on a model with that bug, and lies in port-detective.json; the build
// writes it as port-detective-data.js. config: {case?: the first case's number, budget?: points to spend}.
(() => {
  'use strict';
  const {element, uid} = Course;

  // The suspect of a case: the same number hides the same bug for everybody.
  function culprit(number, count) {
    let x = Math.imul(number + 1, 0x9e3779b1);
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return ((x ^ (x >>> 16)) >>> 0) % count;
  }

  // Whether a person can tell two ports apart by a probe: readings of another kind; or values, when they are texts that differ
  // or numbers a factor of two apart.
  function separates(probe, one, other) {
    const [a, b] = [one.results[probe.id], other.results[probe.id]];
    if (probe.told_apart_by === 'reading') return a.reading !== b.reading;
    if (typeof a.value !== 'number' || typeof b.value !== 'number') return a.value !== b.value;
    const [small, large] = [Math.min(Math.abs(a.value), Math.abs(b.value)), Math.max(Math.abs(a.value), Math.abs(b.value))];
    return large > 0 && (large >= 2 * small || a.value * b.value < 0);
  }
  const value = (subject, probe) => subject.results[probe.id].value;
  const fits = (suspect, bug, used) => used.every((probe) => !separates(probe, suspect, bug));

  // The cheapest set of probes that tells every two bugs apart.
  function leastCost(data) {
    let least = Infinity;
    for (let set = 0; set < 2 ** data.probes.length; set += 1) {
      const chosen = data.probes.filter((_, i) => set & (1 << i));
      const cost = chosen.reduce((sum, probe) => sum + probe.cost, 0);
      const whole = () => data.bugs.every((a, i) => data.bugs.slice(i + 1).every((b) => chosen.some((p) => separates(p, a, b))));
      if (cost < least && whole()) least = cost;
    }
    return least;
  }
  // Enough for proof by a fixed list of probes. Who chooses the next one after each reading needs less.
  function budgetFor(data) {
    const total = data.probes.reduce((sum, probe) => sum + probe.cost, 0);
    return Math.min(leastCost(data), total);
  }

  function format(found) {
    if (typeof found !== 'number') return `“${found}”`;
    return String(found).length <= 6 ? String(found) : String(Number(found.toPrecision(4)));
  }
  // The error at each position, its largest at the top.
  function sketch(curve) {
    const top = Math.max(...curve);
    const at = curve.map((y, x) => `${x},${(38 - (top ? (36 * y) / top : 0)).toFixed(1)}`).join(' ');
    return element('svg', {viewBox: `0 0 ${curve.length - 1} 40`, preserveAspectRatio: 'none', class: 'detective-curve', role: 'img',
      'aria-label': `Largest difference in a logit at positions 0 to ${curve.length - 1}, up to ${format(top)}`},
    element('polyline', {points: at}));
  }
  const points = (n) => `${n} point${n === 1 ? '' : 's'}`;
  const list = (names) => (names.length < 2 ? names.join('') : `${names.slice(0, -1).join(', ')} and ${names[names.length - 1]}`);

  // What there is to say about an answer, one sentence each.
  function judge(data, used, named, bug) {
    const said = [];
    const rivals = data.bugs.filter((other) => other !== bug && fits(other, bug, used));
    const best = (a, b) => data.probes.filter((probe) => !used.includes(probe) && separates(probe, a, b)).sort((p, q) => p.cost - q.cost)[0];
    if (named !== bug) {
      const missed = used.find((probe) => separates(probe, named, bug));
      const other = best(named, bug);
      if (missed) {
        said.push(`You had the evidence: “${missed.name}” reads ${format(value(bug, missed))} in this port, and ${format(value(named, missed))} with the bug you named.`);
      } else if (other) {
        said.push(`${used.length ? 'Your readings fit both.' : 'You looked at nothing.'} “${other.name}” (${points(other.cost)}) tells them apart: `
          + `${format(value(bug, other))} here, ${format(value(named, other))} with the bug you named.`);
      }
    } else if (rivals.length) {
      const other = best(rivals[0], bug);
      said.push(`Your readings fit ${list(rivals.map((rival) => `“${rival.name}”`))} as well, so there was luck in it.`);
      if (other) said.push(`“${other.name}” (${points(other.cost)}) tells it from “${rivals[0].name}”: ${format(value(bug, other))} against ${format(value(rivals[0], other))}.`);
    } else {
      said.push('No other suspect fits your readings: that is proof.');
    }
    return said;
  }
  Course.portDetective = {culprit, separates, leastCost, budgetFor, judge, fits};

  Course.widget('port-detective', async (root, config) => {
    const data = await Course.fetchData('port-detective-data');
    if (!data) throw new Error('expected the readings of port-detective.json, found none: build the site again');
    const budget = config.budget || budgetFor(data);
    let number = Number(config.case) || 1;
    let bug; let used; let out; let named; let over;

    const titleId = uid('detective-title');
    const group = uid('detective-suspect');
    const caseId = uid('detective-case');
    const caseBox = element('input', {type: 'number', id: caseId, min: 1, max: 9999, step: 1, class: 'detective-case'});
    const left = element('span', {class: 'detective-left'});
    const probes = element('ol', {class: 'detective-probes'});
    const suspects = element('fieldset', {class: 'detective-suspects'});
    const said = element('p', {class: 'widget-numbers detective-said', role: 'status', 'aria-live': 'polite'});
    const name = element('button', {type: 'button', class: 'widget-button widget-button-main', text: 'Name the bug', onclick: answer});
    const next = element('button', {type: 'button', class: 'widget-button', text: 'Next case', onclick: () => open(number + 1, true)});
    const again = element('button', {type: 'button', class: 'widget-button', text: 'This case again', onclick: () => open(number, true)});
    caseBox.addEventListener('change', () => open(Number(caseBox.value), false));
    root.setAttribute('role', 'group');
    root.setAttribute('aria-labelledby', titleId);
    root.append(element('p', {class: 'widget-title', id: titleId, text: 'Port detective'}),
      element('p', {class: 'widget-note', text: `One bug hides in this port. You have ${points(budget)} for probes. Read each beside the healthy model, rule suspects out, and name the bug.`}),
      element('p', {class: 'detective-head'}, element('label', {for: caseId, text: 'Case '}), caseBox, left),
      element('p', {class: 'detective-step', text: 'Probes'}), probes, element('p', {class: 'detective-step', text: 'Suspects'}), suspects,
      element('div', {class: 'widget-buttons'}, name, next, again), said,
      element('p', {class: 'widget-note', text: `Every reading was measured. ${Object.entries(data.provenance).filter(([, what]) => typeof what !== 'object').map(([key, what]) => `${key.replaceAll('_', ' ')}: ${what}`).join(' · ')}`}));

    const spent = () => used.reduce((sum, probe) => sum + probe.cost, 0);
    const rows = new Map();
    const lines = new Map();

    function drawProbes() {
      probes.replaceChildren(...data.probes.map((probe) => {
        const press = element('button', {type: 'button', class: 'widget-button', 'data-probe': probe.id, onclick: () => look(probe)},
          element('b', {text: probe.name}), ` · ${points(probe.cost)}`);
        const reading = element('div', {class: 'detective-reading'});
        rows.set(probe, {press, reading});
        return element('li', {}, press, element('span', {class: 'detective-question', text: probe.question}), reading);
      }));
    }
    function drawSuspects() {
      suspects.replaceChildren(element('legend', {class: 'visually-hidden', text: 'Which bug is it?'}), ...data.bugs.map((suspect) => {
        const radio = element('input', {type: 'radio', name: group, value: suspect.id});
        radio.addEventListener('change', () => { named = suspect; refresh(); });
        const toggle = element('button', {type: 'button', class: 'widget-button detective-out', 'data-suspect': suspect.id, 'aria-pressed': 'false',
          'aria-label': `Rule out: ${suspect.name}`, text: 'rule out', onclick: () => rule(suspect)});
        const row = element('div', {class: 'detective-suspect'}, element('label', {}, radio, element('span', {text: ` ${suspect.name}`})), toggle);
        lines.set(suspect, {row, radio, toggle});
        return row;
      }));
    }
    // Buttons that no longer apply keep the focus, so they are marked, not disabled.
    const mark = (button, off) => button.setAttribute('aria-disabled', String(off));
    function refresh() {
      const rest = budget - spent();
      left.textContent = `${rest} of ${points(budget)} left`;
      root.dataset.left = String(rest);
      for (const [probe, {press}] of rows) mark(press, over || used.includes(probe) || probe.cost > rest);
      for (const [suspect, {row, radio, toggle}] of lines) {
        const gone = out.has(suspect);
        row.classList.toggle('detective-gone', gone);
        row.classList.toggle('detective-true', over && suspect === bug);
        radio.disabled = over;
        toggle.setAttribute('aria-pressed', String(gone));
        toggle.textContent = gone ? 'ruled out' : 'rule out';
        mark(toggle, over);
      }
      mark(name, over || !named);
    }
    function look(probe) {
      const rest = budget - spent();
      if (over || used.includes(probe)) return;
      if (probe.cost > rest) {
        said.textContent = `“${probe.name}” costs ${points(probe.cost)}; ${rest} left. Name the bug from what you have.`;
        return;
      }
      used.push(probe);
      const [here, healthy] = [bug.results[probe.id], data.healthy[probe.id]];
      const item = (label, found, kind) => element('div', {}, element('dt', {text: label}), element('dd', {class: kind, text: format(found.value)}));
      rows.get(probe).reading.replaceChildren(
        element('dl', {}, item('this port', here, 'detective-here'), item('healthy', healthy, 'detective-healthy')),
        ...(here.curve ? [sketch(here.curve)] : []), element('p', {text: here.reading}));
      said.textContent = `${probe.name}: this port ${format(here.value)}, healthy ${format(healthy.value)}. ${here.reading} ${points(rest - probe.cost)} left.`;
      refresh();
    }
    function rule(suspect) {
      if (over) return;
      if (!out.delete(suspect)) out.add(suspect);
      const standing = data.bugs.length - out.size;
      said.textContent = `${suspect.name}: ${out.has(suspect) ? 'ruled out' : 'a suspect again'}. ${standing} of ${data.bugs.length} left.`;
      refresh();
    }
    function answer() {
      if (over) return;
      if (!named) {
        said.textContent = 'Choose a suspect first.';
        return;
      }
      over = true;
      const parts = [named === bug ? `Right: ${bug.name}.` : `No: it is “${bug.name}”.`, ...judge(data, used, named, bug)];
      if (out.has(bug)) parts.push('You had ruled it out, and every reading fits it.');
      parts.push(bug.explanation, `The fix: ${bug.fix}`, `Spent: ${spent()} of ${points(budget)}.`);
      said.replaceChildren(...parts.map((part, i) => element(i ? 'span' : 'b', {text: `${part} `})));
      root.dataset.verdict = named === bug ? 'right' : 'wrong';
      refresh();
      next.focus();
    }
    function open(which, focus) {
      number = Number.isInteger(which) && which >= 1 && which <= 9999 ? which : 1;
      caseBox.value = String(number);
      bug = data.bugs[culprit(number, data.bugs.length)];
      [used, out, named, over] = [[], new Set(), null, false];
      delete root.dataset.verdict;
      drawProbes();
      drawSuspects();
      refresh();
      said.textContent = focus ? `Case ${number}. ${points(budget)} to spend.` : '';
      if (focus) rows.get(data.probes[0]).press.focus();
    }
    open(number, false);
  });
})();
