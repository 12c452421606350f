"""Chat templates of current models, written from the formats that their makers publish."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A model's format.

    Args:
        template: jinja text that writes it.
        tokens: its special tokens.
        end: what ends a turn of the assistant, and the row.
        after: what stands after that at the end of a whole conversation.
        reply: what is learnt of an answer, the end aside; {} is the answer.
        bos: the token that begins the text, if there is one.
        eos: the tokenizer's eos; by default the end of turn.
        opening: what the generation prompt has and a conversation without reasoning does not.
        reasoned: the reply where the message has reasoning too, as {think}; None where the format has none.
        system: whether there are system messages.
        rewrites: whether what stands before or in a turn changes when others follow.
        written_end: False where the template writes no end of turn and eos is put there.
    """

    template: str
    tokens: tuple[str, ...]
    end: str
    after: str = ""
    reply: str = "{}"
    bos: str | None = None
    eos: str | None = None
    opening: str = ""
    reasoned: str | None = None
    system: bool = True
    rewrites: bool = False
    written_end: bool = True


def chatml(*, default_system: str = "", bos: str = "", roles: str = "m.role") -> str:
    """ChatML, with the system message that some models write where the user gives none."""
    system = f"<|im_start|>system\n{default_system}<|im_end|>\n" if default_system else ""
    return (
        f"{bos}{{% if messages[0].role != 'system' %}}{system}{{% endif %}}"
        f"{{% for m in messages %}}<|im_start|>{{{{ {roles} }}}}\n{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = Format(chatml(), IM, "<|im_end|>", "\n")

# [INST], the system message within the first user's (<<SYS>>), blanks around what is trimmed.
LLAMA_2 = Format(
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set sys = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ ((sys if loop.first else '') + m.content).strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    reply=" {} ",
    bos="<s>",
)
HEADER = "<|start_header_id|>{{ %s }}<|end_header_id|>\n\n"
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
LLAMA_3 = Format(
    "{{ bos_token }}{% for m in messages %}" + HEADER % "m.role" + "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}" + HEADER % "'assistant'" + "{% endif %}",
    LLAMA_3_TOKENS,
    "<|eot_id|>",
    bos="<|begin_of_text|>",
)
# The system message always stands there, with a date: the argument date_string, else today.
LLAMA_32 = Format(
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{- date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{- m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    LLAMA_3_TOKENS,
    "<|eot_id|>",
    bos="<|begin_of_text|>",
)


LAST_USER = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)


def mistral(before: str, after: str, answer: str) -> str:
    """Mistral's formats differ in blanks; a system message stands in the last message of the user."""
    return (
        "{{ bos_token }}" + LAST_USER + "{% for m in messages %}{% if m.role == 'user' %}" + before + ""
        "{% if loop.index0 == ns.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content }}"
        + after
        + "{% elif m.role == 'assistant' %}"
        + answer
        + "{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}"
    )


S = ("<s>", "</s>")
INST = (*S, "[INST]", "[/INST]")
MISTRAL_1 = Format(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    S,
    "</s>",
    bos="<s>",
    system=False,
)
MISTRAL_3 = Format(mistral("[INST] ", "[/INST]", " "), INST, "</s>", reply=" {}", bos="<s>", rewrites=True)
MISTRAL_TEKKEN = Format(mistral("[INST]", "[/INST]", ""), INST, "</s>", bos="<s>", rewrites=True)

TURN = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
GEMMA_2 = Format(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    TURN,
    "<end_of_turn>",
    "\n",
    bos="<bos>",
    eos="<eos>",
    system=False,
)
GEMMA_3 = Format(
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    TURN,
    "<end_of_turn>",
    "\n",
    bos="<bos>",
    eos="<eos>",
)
# eos stands once, at the end of all.
PHI_3 = Format(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    "<|end|>",
    "\n<|endoftext|>",
    eos="<|endoftext|>",
)
PHI_4 = Format(
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
    (*IM, "<|im_sep|>"),
    "<|im_end|>",
)
QWEN_25 = Format(
    chatml(default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    IM,
    "<|im_end|>",
    "\n",
)
# Reasoning is its own field or stands in the content; it is written after the last question only.
SPLIT = (
    "{% set text = m.content %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN_3 = Format(
    LAST_USER + "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + SPLIT + ""
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{% endif %}"
    "{{ text }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    IM,
    "<|im_end|>",
    "\n",
    reply="<think>\n\n</think>\n\n{}",
    reasoned="<think>\n{think}\n</think>\n\n{}",
    rewrites=True,
)
# The later Qwen 3 that always thinks, and QwQ: the generation prompt opens the tag.
QWEN_3_THINKING = Format(
    QWEN_3.template.split("{% if enable_thinking")[0] + "<think>\n{% endif %}",
    IM,
    "<|im_end|>",
    "\n",
    reply="\n</think>\n\n{}",
    reasoned="{think}\n</think>\n\n{}",
    rewrites=True,
)
QWQ = Format(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    IM,
    "<|im_end|>",
    "\n",
    opening="<think>\n",
)
BAR = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK = (
    "{{ bos_token }}{%% for m in messages %%}{%% if m.role == 'system' %%}{{ m.content }}"
    "{%% elif m.role == 'user' %%}<｜User｜>{{ m.content }}"
    "{%% else %%}%s<｜end▁of▁sentence｜>{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}<｜Assistant｜>%s{%% endif %%}"
)
DEEPSEEK_V3 = Format(DEEPSEEK % ("<｜Assistant｜>{{ m.content }}", ""), BAR, BAR[1], bos=BAR[0])
DEEPSEEK_R1 = Format(
    DEEPSEEK % ("<｜Assistant｜>{{ m.content.split('</think>')[-1] }}", "<think>\n"),
    BAR,
    BAR[1],
    bos=BAR[0],
    opening="<think>\n",
)
DEEPSEEK_V31 = Format(
    DEEPSEEK % ("<｜Assistant｜></think>{{ m.content.split('</think>')[-1] }}", "</think>"),
    (*BAR, "<think>", "</think>"),
    BAR[1],
    bos=BAR[0],
)
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")
GLM_4 = Format(
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    GLM,
    "<|endoftext|>",
    reply="\n{}",
    written_end=False,
)
GLM_45 = Format(
    "[gMASK]<sop>" + LAST_USER + "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>" + SPLIT + ""
    "{% if loop.index0 > ns.last and thought %}{{ '\n<think>' + thought.strip() + '</think>' }}"
    "{% else %}{{ '\n<think></think>' }}{% endif %}{{ '\n' + text.strip() }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    GLM,
    "<|endoftext|>",
    reply="\n<think></think>\n{}",
    reasoned="\n<think>{think}</think>\n{}",
    written_end=False,
)
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
# The last turn ends with <|return|>, earlier ones with <|end|>; the analysis of earlier ones is left out.
GPT_OSS = Format(
    "{%- macro about() -%}You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: {{ strftime_now('%Y-%m-%d') }}\n\nReasoning: {{ reasoning_effort or 'medium' }}{%- endmacro -%}"
    "<|start|>system<|message|>{{ about() }}<|end|>"
    "{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|># Instructions\n\n"
    "{{ m.content }}\n\n<|end|>{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% else %}{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    HARMONY,
    "<|return|>",
    reply="<|channel|>final<|message|>{}",
    reasoned="<|channel|>analysis<|message|>{think}<|end|><|start|>assistant<|channel|>final<|message|>{}",
    rewrites=True,
)
COMMAND_R = Format(
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "<|{{ {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] }}_TOKEN|>"
    "{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
    ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    "<|END_OF_TURN_TOKEN|>",
    bos="<BOS_TOKEN>",
)
ROLE = "<|start_of_role|>{{ %s }}<|end_of_role|>"
GRANITE_3 = Format(
    "{% if messages[0].role != 'system' %}" + ROLE % "'system'" + "Knowledge Cutoff Date: April 2024.\n"
    "Today's Date: {{ strftime_now('%B %d, %Y') }}.\nYou are Granite, developed by IBM.<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}" + ROLE % "m.role" + "{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}" + ROLE % "'assistant'" + "{% endif %}",
    ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "<|end_of_text|>",
    "\n",
)
OLMO_2 = Format(
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    ("<|endoftext|>",),
    "<|endoftext|>",
    bos="<|endoftext|>",
)
SMOLLM_2 = Format(
    chatml(default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    IM,
    "<|im_end|>",
    "\n",
)
SMOLLM_3 = Format(
    "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
    "Reasoning Mode: /no_think\n\n## Custom Instructions\n\n"
    "{{ messages[0].content if messages[0].role == 'system' else 'You are a helpful AI assistant.' }}\n\n<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}<think>\n\n</think>\n{{ m.content.lstrip('\n') }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    IM,
    "<|im_end|>",
    "\n",
    reply="<think>\n\n</think>\n{}",
)
ZEPHYR = Format(
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    S,
    "</s>",
    "\n",
)
VICUNA = Format(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}A chat between a curious "
    "user and an artificial intelligence assistant.{% endif %}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %} USER: {{ m.content }}{% else %} ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}",
    S,
    "</s>",
    reply=" {}",
    bos="<s>",
)
FALCON = Format(
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    ("<|endoftext|>",),
    "<|endoftext|>",
    "\n\n",
    reply=" {}",
    written_end=False,
)
NEMOTRON = Format(
    "<extra_id_0>System\n{{ messages[0].content if messages[0].role == 'system' }}\n"
    "{% for m in messages if m.role != 'system' %}<extra_id_1>{{ m.role | capitalize }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<extra_id_1>Assistant\n{% endif %}",
    ("<extra_id_0>", "<extra_id_1>", "</s>"),
    "</s>",
    "\n",
    written_end=False,
)
MINIMAX_1 = Format(
    "{% for m in messages %}<beginning_of_sentence>{{ {'system': 'system ai_setting=MiniMax AI', "
    "'user': 'user name=user', 'assistant': 'ai name=MiniMax AI'}[m.role] }}\n{{ m.content }}<end_of_sentence>\n"
    "{% endfor %}{% if add_generation_prompt %}<beginning_of_sentence>ai name=MiniMax AI\n{% endif %}",
    ("<beginning_of_sentence>", "<end_of_sentence>"),
    "<end_of_sentence>",
    "\n",
)
MINIMAX_2 = Format(
    "]~!b[" + LAST_USER + "{% for m in messages %}]~b]{{ {'assistant': 'ai'}.get(m.role, m.role) }}\n"
    "{% if m.role == 'assistant' %}" + SPLIT + "{% if thought and loop.index0 > ns.last %}<think>\n{{ thought }}\n"
    "</think>\n\n{% endif %}{{ text }}{% else %}{{ m.content }}{% endif %}[e~[\n{% endfor %}"
    "{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}",
    ("]~!b[", "]~b]", "[e~["),
    "[e~[",
    "\n",
    opening="<think>\n",
    reasoned="{think}\n</think>\n\n{}",
)
KIMI_K2 = Format(
    "{% if messages[0].role != 'system' %}<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by "
    "Moonshot AI.<|im_end|>{% endif %}{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>"
    "{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}",
    ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "[EOS]"),
    "<|im_end|>",
    eos="[EOS]",
)
HY = ("<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>", "<｜hy_place▁holder▁no▁3｜>", "<｜hy_User｜>")
HUNYUAN = Format(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}<｜hy_place▁holder▁no▁3｜>{% endif %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<｜hy_User｜>{{ m.content }}"
    "{% else %}<｜hy_Assistant｜>{{ m.content }}<｜hy_place▁holder▁no▁2｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜hy_Assistant｜>{% endif %}",
    (*HY, "<｜hy_Assistant｜>"),
    HY[1],
    bos=HY[0],
)
OPENCHAT = Format(
    "{{ bos_token }}{% for m in messages %}GPT4 Correct {{ m.role.title() + ': ' + m.content }}<|end_of_turn|>"
    "{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
    ("<s>", "</s>", "<|end_of_turn|>"),
    "<|end_of_turn|>",
    reply=" {}",
    bos="<s>",
)
EXAONE_35 = Format(
    "{% if messages[0].role != 'system' %}[|system|][|endofturn|]\n{% endif %}{% for m in messages %}"
    "[|{{ m.role }}|]{{ m.content }}{% if m.role != 'user' %}[|endofturn|]{% endif %}{% if not loop.last %}{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n[|assistant|]' }}{% endif %}",
    ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "[|endofturn|]",
)
LFM_2 = Format(chatml(bos="{{ bos_token }}"), (*IM, "<|startoftext|>"), "<|im_end|>", "\n", bos="<|startoftext|>")
SEED_OSS = Format(
    "{% for m in messages %}<seed:bos>{{ m.role }}\n{% if m.role == 'assistant' and m.reasoning_content %}<seed:think>"
    "{{ m.reasoning_content }}</seed:think>{% endif %}{{ m.content }}<seed:eos>{% endfor %}"
    "{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}",
    ("<seed:bos>", "<seed:eos>"),
    "<seed:eos>",
    reasoned="<seed:think>{think}</seed:think>{}",
)

FORMATS = {name: value for name, value in list(globals().items()) if isinstance(value, Format)}
