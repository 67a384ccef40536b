"""URL KEY: typed decisions by LangChain, synchronous, asynchronous and over a conversation."""

import asyncio
import json
import sys
import warnings

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai.decisions import Choice, OpenAIDecisions, Predicate, Score

url, key = sys.argv[1:]
# LangChain calls the class beta.
warnings.simplefilter("ignore")
decisions = OpenAIDecisions(model="judge", base_url=f"{url}/v1", api_key=key)
TICKET = "I was charged twice for my subscription, and nobody has answered my three e-mails."
QUESTIONS = {
    "urgent": Predicate(instructions="Is this request urgent?"),
    "team": Choice(
        instructions="Which team should handle this request?",
        choices={"billing": "Payments and subscriptions.", "technical": "Bugs and outages.", "other": None},
    ),
    "mood": Score(instructions="How frustrated is the customer?", levels=["Calm", "Concerned", "Angry"]),
}
CONVERSATION = [HumanMessage("What is the capital of France?"), AIMessage("Paris.")]


def answers(response):
    return response.model_dump(mode="json")["answers"]


asked = {"input": TICKET, "questions": QUESTIONS}
talked = {"input": CONVERSATION, "questions": {"right": Predicate(instructions="Is the answer right?")}}
told = {
    "sync": answers(decisions.invoke(asked)),
    "async": answers(asyncio.run(decisions.ainvoke(asked))),
    "conversation": answers(decisions.invoke(talked)),
}
print(json.dumps(told))
