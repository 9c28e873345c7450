"""Chat templates of the usual kinds, in own words: what they do to a conversation, without their authors' texts."""

CHATML = """
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
# The system text inside the first user turn; no other roles; turns must alternate; no prompt for a response.
LLAMA_2 = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for m in (messages[1:] if system else messages) -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
  {%- if m.role == 'user' -%}
    {{- bos_token + '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.first else '') -}}
    {{- m.content.strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + m.content.strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
# A head of names for each turn; tools in the first user turn; one call a turn, its arguments as an object.
LLAMA_3 = """
{{- bos_token -}}
{%- set head = '<|start_header_id|>' -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls -%}
    {%- if m.tool_calls | length > 1 -%}{{ raise_exception('one call a turn') }}{%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- head + 'assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' -}}
    {{- call.arguments | tojson + '}<|eot_id|>' -}}
  {%- elif m.role == 'tool' -%}
    {{- head + 'ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' -}}
  {%- else -%}
    {{- head + m.role + '<|end_header_id|>\\n\\n' -}}
    {%- if tools and m.role == 'user' and not messages[:loop.index0] | selectattr('role', 'equalto', 'user') | list -%}
      {{- 'Functions:\\n' + tools | tojson(indent=2) + '\\n\\n' -}}
    {%- endif -%}
    {{- m.content | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ head + 'assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
# Tools beside the system text; thoughts of turns before the last question are left out; tool results in user turns.
QWEN_3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- set content = m.content if m.content is string else '' -%}
  {%- if m.role == 'system' -%}
    {%- if not (tools and loop.first) -%}{{- '<|im_start|>system\\n' + content + '<|im_end|>\\n' -}}{%- endif -%}
  {%- elif m.role == 'assistant' -%}
    {%- set thoughts = m.reasoning_content or '' -%}
    {%- if '</think>' in content -%}
      {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.last and (loop.last or thoughts) -%}
      {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- content -}}
    {%- for call in m.tool_calls -%}
      {{- ('\\n' if content or not loop.first else '') + '<tool_call>\\n{"name": "' + call.function.name -}}
      {{- '", "arguments": ' -}}
      {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# Tools before the last user turn, wherever that is; calls as a list; no prompt for a response.
MISTRAL = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {%- if tools and loop.index0 == ns.last -%}
      {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST] ' + m.content + '[/INST]' -}}
  {%- elif m.role == 'assistant' and m.tool_calls -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in m.tool_calls -%}
      {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' -}}
      {{- ', ' if not loop.last -}}
    {%- endfor -%}
    {{- ']' + eos_token -}}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' + m.content + eos_token -}}
  {%- elif m.role == 'tool' -%}
    {{- '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' -}}
  {%- else -%}
    {{- raise_exception('no role ' + m.role) -}}
  {%- endif -%}
{%- endfor -%}
"""
# The assistant is called model; a system text goes into the first user turn; everything trimmed.
GEMMA = """
{{- bos_token -}}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for m in (messages[1:] if system else messages) -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
  {{- (system + '\\n\\n' if loop.first and system else '') + m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
# Thoughts are never kept, and a response is prompted to think; arguments of calls are text.
DEEPSEEK = """
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{{- m.content -}}
  {%- elif m.role == 'user' -%}{{- '<｜User｜>' + m.content -}}
  {%- elif m.role == 'tool' -%}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}
  {%- else -%}
    {{- '<｜Assistant｜>' + (m.content or '').split('</think>')[-1].lstrip() -}}
    {%- for call in m.tool_calls -%}
      {{- '<｜tool▁call▁begin｜>' + call.function.name + '\\n' + call.function.arguments + '<｜tool▁call▁end｜>' -}}
    {%- endfor -%}
    {{- '<｜end▁of▁sentence｜>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""
# The end of the text is written after the last turn only.
PHI = """
{%- for m in messages -%}
  {{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}
"""
# Generation marks, which leave out what ends the turn.
MARKED = """
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{- m.content -}}{%- endgeneration -%}
  {%- else -%}{{- m.content -}}{%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
"""

# Of each kind its template and its control tokens.
KINDS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama 2": (LLAMA_2, ["<s>", "</s>"]),
    "llama 3": (LLAMA_3, ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen 3": (QWEN_3, ["<|im_start|>", "<|im_end|>"]),
    "mistral": (
        MISTRAL,
        ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    ),
    "gemma": (GEMMA, ["<s>", "<start_of_turn>", "<end_of_turn>"]),
    "deepseek": (
        DEEPSEEK,
        ["<s>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁call▁begin｜>",
         "<｜tool▁call▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"],
    ),
    "phi": (PHI, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "marked": (MARKED, ["<|im_start|>", "<|im_end|>"]),
}  # fmt: skip
