"""Run in a process of its own: starts the real vLLM engine, once for each model, and prints the greedy tokens as JSON.

``python engine.py '{"llm": {LLM arguments}, "models": [paths], "prompts": [[ids]], "tokens": n, "adapter": path or
null}'``

With ``"runner": "pooling"`` among the arguments, it prints the probabilities of the classes, or the embeddings.
"""

import gc
import json
import sys

from forked_workers import fork_workers
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from arctic_plugins.testing import say


def answers(llm, job):
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    if llm.model_config.runner_type == "pooling":
        if "classify" in llm.supported_tasks:
            return {"pooled": [output.outputs.probs for output in llm.classify(prompts, use_tqdm=False)]}
        return {"pooled": [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]}
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0)
    outputs = [output.outputs[0] for output in llm.generate(prompts, sampling)]
    result = {
        "base": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ],
    }
    if job.get("adapter"):
        outputs = llm.generate(prompts, sampling, lora_request=LoRARequest("adapter", 1, job["adapter"]))
        result["adapter"] = [list(output.outputs[0].token_ids) for output in outputs]
    return result


if __name__ == "__main__":
    fork_workers()
    job = json.loads(sys.argv[1])
    for model in job["models"]:
        llm = LLM(model=model, **job["llm"])
        result = answers(llm, job)
        print()  # what vLLM printed may be without its end of line
        say(result)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
