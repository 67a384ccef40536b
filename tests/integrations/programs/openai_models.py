"""URL KEY: the models that the service has, as OpenAI's Python library reads them."""

import json
import sys

from openai import OpenAI

url, key = sys.argv[1:]
with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
    print(json.dumps([model.id for model in client.models.list()]))
