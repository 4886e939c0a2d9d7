"""Measures one case of the serve benchmark with llama.cpp.

``python peer_llama_cpp.py MODEL.gguf decode|prefill CONTEXT TOKENS THREADS`` prints a JSON object. The model
runs as it is quantised in the file. Run by ``peer`` in its own environment. Must not import Farshore, which
is not installed there.
"""

import json
import random
import sys
import time

from llama_cpp import Llama


def main() -> None:
    path, case = sys.argv[1:3]
    context, tokens, threads = map(int, sys.argv[3:6])
    random.seed(0)
    model = Llama(path, n_ctx=context + tokens + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = [random.randrange(model.n_vocab()) for _ in range(context)]
    begun_s = time.perf_counter()
    model.eval(prompt)
    times_s = [time.perf_counter() - begun_s]
    if case == "decode":
        times_s = []
        for _ in range(tokens):
            begun_s = time.perf_counter()
            model.eval([model.sample(temp=0.0)])
            times_s.append(time.perf_counter() - begun_s)
        times_s = times_s[4:]
    print(json.dumps({"times_s": times_s, "weights": "as quantised in the file"}))


main()
