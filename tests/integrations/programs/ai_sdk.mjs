// URL KEY: typed decisions by the AI SDK, through both of its providers that know them.
import { createOpenAI } from "@ai-sdk/openai";
import { createTypeSafeAi } from "@ai-sdk/typesafe-ai";
import { experimental_decide as decide } from "ai";

const [url, key] = process.argv.slice(2);
const settings = { baseURL: `${url}/v1`, apiKey: key };
const state = "I was charged twice for my subscription, and nobody has answered my three e-mails.";
const questions = {
  urgent: { type: "boolean", instructions: "Is this request urgent?" },
  team: {
    type: "choice",
    instructions: "Which team should handle this request?",
    criteria: { billing: "Payments and subscriptions.", technical: "Bugs and outages." },
  },
  mood: { type: "score", instructions: "How frustrated is the customer?", criteria: ["Calm", "Concerned", "Angry"] },
};
const models = {
  openai: createOpenAI(settings).decisionModel("judge"),
  typesafe: createTypeSafeAi(settings).evaluationModel("judge"),
};
const told = {};
for (const [name, model] of Object.entries(models)) {
  const { answers, usage } = await decide({ model, state, questions });
  told[name] = { answers, usage };
}
console.log(JSON.stringify(told));
