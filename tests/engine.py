"""Run in a process of its own: starts the real vLLM engine and prints the greedy tokens as JSON.

``python engine.py '{"llm": {LLM arguments}, "prompts": [[ids]], "tokens": n, "adapter": path or null}'``
"""

import json
import sys

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["llm"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    result = {"base": [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling)]}
    if job.get("adapter"):
        outputs = llm.generate(prompts, sampling, lora_request=LoRARequest("adapter", 1, job["adapter"]))
        result["adapter"] = [list(output.outputs[0].token_ids) for output in outputs]
    print("\nRESULT " + json.dumps(result))
