"""Write the first token after a prompt with transformers, from a cold start:
benchmarks/compile.py's peer."""

import sys

import transformers

folder, prompt = sys.argv[1:]
tok = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
ids = tok(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tok.decode(out[0, ids.input_ids.shape[1] :]), flush=True)
