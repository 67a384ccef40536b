"""URL KEY: verifiers' DecisionJudge, as prime-rl rewards a response."""

import asyncio
import json
import os
import sys

from verifiers.v1.judges.decision import DecisionJudge, DecisionJudgeConfig

url, os.environ["JUDGE_KEY"] = sys.argv[1:]
config = DecisionJudgeConfig(base_url=f"{url}/v1/systemone", model="judge", api_key_var="JUDGE_KEY")
judge = DecisionJudge(config)
result = asyncio.run(judge.evaluate(question="What is the capital of France?", response="Paris.", answer="Paris"))
told = {
    "instructions": judge.prompt,
    "levels": config.levels,
    "score": result.parsed,
    "answer": json.loads(result.text),
}
print(json.dumps(told))
