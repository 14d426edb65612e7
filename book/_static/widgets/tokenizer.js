// The tokenizer playground: the course's own byte-pair encoding, in the page.
//
// The same three steps as Python: cut the text into words with one regular expression, take the bytes of a word, and join the pair
// with the lowest id until no known pair is left. What a letter, a number or white space is comes with the data (see
// book/_ext/course_widgets.py), so the ids do not depend on the browser's Unicode version.
(() => {
  'use strict';
  const {element, uid} = Course;

  function build(data) {
    const hex = (n) => `\\u{${n.toString(16)}}`;
    const set = (ranges) => ranges.map(([a, b]) => (a === b ? hex(a) : `${hex(a)}-${hex(b)}`)).join('');
    const [L, N, S] = [set(data.letters), set(data.numbers), set(data.spaces)];
    const pattern = new RegExp(
      `'(?:[sdmt]|ll|ve|re)| ?[${L}]+| ?[${N}]+| ?[^${S}${L}${N}]+|[${S}]+(?![^${S}])|[${S}]+`, 'gu');

    // Bytes are kept as strings of characters 0–255, so that they can be keys of a Map.
    const tokens = data.tokens.map((token) => atob(token));
    const ranks = new Map(tokens.map((token, id) => [token, id]));
    const utf8 = new TextEncoder();
    const bytesOf = (text) => Array.from(utf8.encode(text), (byte) => String.fromCharCode(byte));

    function encodeWord(word) {
      const parts = bytesOf(word);
      const whole = ranks.get(parts.join(''));
      if (whole !== undefined) return [whole];
      const rankAt = (i) => {
        const rank = i + 1 < parts.length ? ranks.get(parts[i] + parts[i + 1]) : undefined;
        return rank === undefined ? Infinity : rank;
      };
      const pairs = parts.map((_, i) => rankAt(i));
      for (;;) {
        let best = -1;
        for (let i = 0; i < pairs.length; i += 1) if (pairs[i] < (best < 0 ? Infinity : pairs[best])) best = i;
        if (best < 0) break;
        parts.splice(best, 2, parts[best] + parts[best + 1]);
        pairs.splice(best + 1, 1);
        pairs[best] = rankAt(best);
        if (best > 0) pairs[best - 1] = rankAt(best - 1);
      }
      return parts.map((part) => ranks.get(part));
    }

    // A half of a surrogate pair is no character: Python's tiktoken reads it as U+FFFD, and so does TextEncoder.
    const wellFormed = (text) => Array.from(text, (c) => (/^[\ud800-\udfff]$/.test(c) ? '\ufffd' : c)).join('');
    const words = (text) => wellFormed(text).match(pattern) || [];
    return {
      encode: (text) => words(text).flatMap(encodeWord),
      bytes: (id) => tokens[id],
      size: tokens.length + 1,
    };
  }

  let ready;
  const tokenizer = () => {
    ready = ready || Course.fetchData('stories2048').then((data) => {
      if (!data) throw new Error('no vocabulary in this build of the site');
      Course.tokenizer = build(data);
      return Course.tokenizer;
    });
    return ready;
  };

  // What a token looks like: its text when its bytes are whole characters, else its bytes.
  function show(bytes) {
    try {
      const text = new TextDecoder('utf-8', {fatal: true, ignoreBOM: true})
        .decode(Uint8Array.from(bytes, (c) => c.charCodeAt(0)));
      return text.replace(/ /g, '·').replace(/\n/g, '⏎').replace(/\t/g, '⇥').replace(/\r/g, '␍')
        .replace(/[\p{C}\p{Z}]/gu, (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`);
    } catch {
      return Array.from(bytes, (c) => c.charCodeAt(0).toString(16).toUpperCase().padStart(2, '0')).join(' ');
    }
  }

  const EXAMPLES = [
    ['A story', 'Once upon a time, there was a little girl named Lily. She loved to play outside.'],
    ['Rare words', 'The logarithm of antidisestablishmentarianism.'],
    ['Numbers', '12 + 345 = 357, and 1,000,000 is a million.'],
    ['Code', 'for i in range(10):\n    print(i)'],
    ['Other scripts', 'Größe, naïve, привет, 你好, 🙂'],
  ];

  Course.widget('tokenizer', async (root) => {
    const tok = await tokenizer();
    const [inputId, noteId] = [uid('tokens-text'), uid('tokens-note')];
    const input = element('textarea', {id: inputId, rows: 3, maxlength: 4000, spellcheck: 'false', autocomplete: 'off',
      'aria-describedby': noteId});
    input.value = root.dataset.text || EXAMPLES[0][1];
    const numbers = element('p', {class: 'widget-numbers', 'aria-live': 'polite'});
    const chips = element('ol', {class: 'tokens', 'aria-label': 'Tokens, with their ids', tabindex: '0'});
    const ids = element('code', {class: 'token-ids'});
    const idsBox = element('div', {class: 'token-ids-box', tabindex: '0', role: 'group', 'aria-label': 'The ids as a list'}, ids);

    function update() {
      const text = input.value;
      const found = tok.encode(text);
      const characters = Array.from(text).length;
      chips.replaceChildren(...found.map((id, i) => element('li', {class: `token token-${i % 5}`},
        element('span', {class: 'token-text', text: show(tok.bytes(id))}),
        element('span', {class: 'token-id', text: String(id)}))));
      const per = found.length ? (characters / found.length).toFixed(2) : '–';
      numbers.textContent = `${found.length} token${found.length === 1 ? '' : 's'}, ${characters} characters, `
        + `${per} characters per token`;
      ids.textContent = `[${found.join(', ')}]`;
    }
    const examples = element('div', {class: 'widget-buttons', role: 'group', 'aria-label': 'Examples'},
      ...EXAMPLES.map(([label, text]) => element('button', {type: 'button', class: 'widget-button', text: label,
        onclick: () => { input.value = text; update(); }})));
    root.append(
      element('p', {class: 'widget-title', text: 'Tokenizer playground'}),
      element('label', {for: inputId, class: 'widget-label', text: `Type anything; the vocabulary has ${tok.size.toLocaleString('en')} tokens.`}),
      input, examples, numbers, chips, idsBox,
      element('p', {class: 'widget-note', id: noteId,
        text: '· is a space. A token that holds part of a character is shown as its bytes. The ids are those that Python gives.'}));
    input.addEventListener('input', update);
    update();
  });

  Course.loadTokenizer = tokenizer;
})();
