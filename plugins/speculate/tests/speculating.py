"""Run in a process of its own: starts the real engine for each job of the JSON list in a file, and prints a line each.

A job: ``{"checkpoint": path, "plugins": {name: options}, "base": path or null, "llm": {LLM arguments}, "adapter": path
or null, "prompts": [[ids]], "tokens": n, "rounds": n, "sampled": {"prompt": [ids], "times": n, "top_k": k,
"temperature": t} or null}``. Its line has the greedy tokens of each round, the tokens that were sampled, and what vLLM
counted. With ``"config": true`` no engine is started, and the line has what vLLM makes of the arguments.
"""

import gc
import json
import sys
from pathlib import Path

from arctic_plugins_vllm.serving import engine_args
from vllm import LLM, EngineArgs, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from arctic_plugins.testing import say


def counted(llm):
    """Drafts, drafted tokens and accepted tokens so far."""
    found = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }
    return [found.get(f"vllm:spec_decode_num_{name}", 0) for name in ("drafts", "draft_tokens", "accepted_tokens")]


def greedy(llm, job, adapter=None):
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    outputs = llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "counts": counted(llm),
    }


def sampled(llm, *, prompt, times, top_k, temperature):
    sampling = SamplingParams(temperature=temperature, top_k=top_k, max_tokens=2, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt)] * times, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        arguments = engine_args(job["checkpoint"], job["plugins"], base=job.get("base"), **job["llm"])
        if job.get("config"):
            config = EngineArgs(**arguments).create_engine_config().speculative_config
            say({"method": config.method, "tokens": config.num_speculative_tokens, "longest": config.prompt_lookup_max})
            continue
        llm = LLM(**arguments, disable_log_stats=False)
        result = {"base": [greedy(llm, job) for _ in range(job["rounds"])]}
        if job.get("adapter"):
            request = LoRARequest("adapter", 1, job["adapter"])
            result["adapter"] = [greedy(llm, job, request) for _ in range(job["rounds"])]
        if job.get("sampled"):
            before = counted(llm)
            result["sampled"] = sampled(llm, **job["sampled"])
            result["counts"] = [after - earlier for after, earlier in zip(counted(llm), before, strict=True)]
        print()  # what vLLM printed may be without its end of line
        say(result)
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
