// URL KEY BODY: the models and typed decisions by OpenAI's library for Node.
import OpenAI from "openai";

const [url, key, body] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
const decision = await client.decisions.create(JSON.parse(body));
console.log(JSON.stringify({ models, decision }));
