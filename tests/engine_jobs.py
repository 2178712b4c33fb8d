"""Run in a process of its own: starts the real vLLM engine once for each job of the JSON list given, and prints what it
answers, one line each.

A job: ``{"llm": {LLM arguments}, "prompts": [[ids]], "tokens": n, "adapter": path or null, "twice": bool, "scored":
bool}``. ``@FILE`` instead of the list has it in a file. Of each job it also says the longest text and the peak of
resident memory.
"""

import gc
import json
import resource
import sys
from pathlib import Path

from forked_workers import fork_workers
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from arctic_plugins.testing import say


def answers(llm, job, *, scored=True, adapter=None):
    """Greedy tokens and their log-probabilities; those of the prompts, from the second token on (asking for them leaves
    the prefix cache out).
    """
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=0, prompt_logprobs=0 if scored else None
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    outputs = llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
    found = {"tokens": [], "logprobs": [], "prompt": [], "cached": [output.num_cached_tokens for output in outputs]}
    for output in outputs:
        answer = output.outputs[0]
        found["tokens"].append(list(answer.token_ids))
        found["logprobs"].append(
            [entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        )
        if scored:
            rest = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            found["prompt"].append([entry[token].logprob for entry, token in rest])
    return found


if __name__ == "__main__":
    fork_workers()
    text = sys.argv[1]
    for job in json.loads(Path(text[1:]).read_text() if text.startswith("@") else text):
        llm = LLM(**job["llm"])
        result = {
            "base": answers(llm, job, scored=job.get("scored", True)),
            "max_model_len": llm.model_config.max_model_len,
        }
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        if job.get("twice"):
            result["again"] = answers(llm, job, scored=False)
            result["cached"] = answers(llm, job, scored=False)
        if job.get("adapter"):
            result["adapter"] = answers(llm, job, adapter=LoRARequest("adapter", 1, job["adapter"]))
        print()  # what vLLM printed may be without its end of line
        say(result)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
