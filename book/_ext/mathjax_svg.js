// Formulas to SVG: reads one JSON line {"tex", "display"}, answers one line {"svg"} or {"error"}.
// Started by course_math.py with the folder of MathJax as its argument.
const root = process.argv[2];

global.MathJax = {
  loader: {
    paths: {mathjax: root},
    require: require,
    load: ['adaptors/liteDOM', 'input/tex-full', 'output/svg', 'a11y/assistive-mml'],
  },
  // Without `noerrors` and `noundefined` a misspelt macro is an error, not red text on the page.
  tex: {packages: ['base', 'ams', 'newcommand', 'boldsymbol', 'mathtools', 'color', 'cancel', 'textmacros'],
        formatError: (jax, error) => { throw error; }},
  svg: {fontCache: 'local'},
  options: {enableAssistiveMml: true},
  startup: {typeset: false},
};
require(root + '/startup.js');

MathJax.startup.promise.then(() => {
  const adaptor = MathJax.startup.adaptor;
  require('readline').createInterface({input: process.stdin}).on('line', (line) => {
    const {tex, display} = JSON.parse(line);
    let answer;
    try {
      const container = MathJax.tex2svg(tex, {display});
      answer = {svg: adaptor.outerHTML(container)};
    } catch (error) {
      answer = {error: String(error.message || error)};
    }
    process.stdout.write(JSON.stringify(answer) + '\n');
  });
}).catch((error) => { console.error(error); process.exit(1); });
