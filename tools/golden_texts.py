"""Texts written for this project, on which the goldens record log-probabilities, and prompts to continue."""

from __future__ import annotations


def _prose(text: str) -> str:
    """One line a paragraph; the lines in this file are short for its readers only."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


# Longer than Gemma 3's sliding window of 512 tokens, so that the window's edge is part of the comparison.
_HARBOUR = _prose(
    """
The harbour master kept two clocks on the wall of her office. One showed the time of the town, which was the
time of trains, schools and bakeries. The other showed the time of the tide, and its single hand went round once
in a little over twelve hours, pointing to high water at the top and low water at the bottom. Visitors always
looked at the first clock. The pilots, when they came in from the rain with their coats dripping, looked only at
the second.

She had learned to read both at once. In the morning the ferry came at seven by the one and at half flood by the
other, and she knew from the sound of its engine whether the captain had trusted the tide or his timetable. A
heavy, steady beat meant that he had waited for the water. A quick, nervous one meant that he had come too
early, was crossing the bar with a hand's breadth under the keel, and would be in a bad mood until lunch.

One autumn a young engineer arrived from the capital to modernise the port. He brought a laptop, three sensors
in yellow boxes, and a plan. The sensors would measure the depth of the water every ten seconds and send it to a
screen, where anyone could see it. "You will not need the clock any more," he said, not unkindly. She helped him
to carry the boxes to the end of the pier, because the steps were slippery and he was wearing the wrong shoes.

For a month the screen worked. The numbers came in, rose and fell, and drew a smooth blue curve which everybody
admired. The pilots began to glance at the screen, then at the clock, then at each other. The figures agreed so
well that people stopped comparing them. That was when she began to compare them more carefully, because in her
experience things that agree too well are either true or not being measured at all.

The storm came in the second week of November. The wind turned to the north and pushed the sea into the bay, so
that the water stood a metre higher than the moon alone would have made it. The clock, which knew only the moon,
was wrong. The screen, which knew the water, was right, and for six hours the engineer was the most important
man in the town. He telephoned the numbers to the fire brigade, and they moved the cars from the lower street
before it flooded.

Then the lightning struck the pier. The curve on the screen went on, smooth and blue, because the program had
been written to fill the gaps with what it expected. Nobody noticed for a while. She noticed, because the curve
was falling and the puddle outside her door was not. She took the old brass lead from its hook, walked out to
the quay with a lamp, and let the line run through her fingers until it touched the ground. Then she went back
and wrote the depth in chalk on the wall, with the time beside it, and under it a second line, and a third,
every ten minutes until the morning.

When the engineer read the wall at dawn he was silent for some time. "It should say when it is guessing," he
said at last. "Yes," said the harbour master, "so should we all." They repaired the sensors together, and he
changed the program so that the curve turned grey wherever it was not measured. She kept her clock, he kept his
screen, and the pilots, who are practical people, looked at both, and then out of the window.
"""
)

_ESSAY = _prose(
    """
Why do bridges hum? A bridge is never still. Traffic, wind and the warmth of the sun all push on it, and each
push makes the structure bend by an amount too small to see. Like a guitar string, a long beam has certain
frequencies at which it prefers to vibrate. If the pushes arrive at one of those frequencies, their effects add
up, and the movement grows until friction takes away as much energy as each push brings. Engineers therefore do
two things: they choose the stiffness and the mass so that the natural frequencies lie away from walking pace
and from the rhythm of the wind, and they add dampers, which turn motion into heat. For example, a footbridge
that sways at two cycles per second would match the steps of a crowd; moving that to five cycles per second, or
adding a damper with 3% of critical damping, makes it comfortable to cross.
"""
)

_CODE = '''import heapq
from collections import defaultdict


def shortest_path(edges, start, goal):
    """Return (distance, path) between two nodes of a weighted graph, or (inf, []) if there is none."""
    graph = defaultdict(list)
    for a, b, weight in edges:
        graph[a].append((b, weight))
        graph[b].append((a, weight))

    queue = [(0, start, [start])]
    seen = set()
    while queue:
        distance, node, path = heapq.heappop(queue)
        if node == goal:
            return distance, path
        if node in seen:
            continue
        seen.add(node)
        for neighbour, weight in graph[node]:
            if neighbour not in seen:
                heapq.heappush(queue, (distance + weight, neighbour, path + [neighbour]))
    return float("inf"), []


if __name__ == "__main__":
    roads = [("A", "B", 4), ("A", "C", 1), ("C", "B", 2), ("B", "D", 5)]
    print(shortest_path(roads, "A", "D"))  # (8, ['A', 'C', 'B', 'D'])
'''

_GERMAN = _prose(
    """
Im Winter friert der See hinter der alten Mühle zu. Die Kinder aus dem Dorf warten jedes Jahr auf den ersten
kalten Morgen, an dem der Lehrer mit einem langen Stock auf das Eis klopft und den Kopf schüttelt oder nickt.
Wenn er nickt, fällt der Unterricht für eine Stunde aus. Dann hört man über das ganze Tal das Kratzen der
Schlittschuhe und das Lachen derer, die noch nicht bremsen können.
"""
)

_FRENCH = _prose(
    """
Le marché ouvre à six heures, mais les habitués arrivent avant. Ils savent que la boulangère garde les meilleurs
pains sous le comptoir et que le poissonnier baisse ses prix quand la pluie commence. On parle peu, on choisit
vite, et l'on rentre chez soi avec un panier trop lourd et l'impression d'avoir gagné quelque chose.
"""
)

_SPANISH = _prose(
    """
Para hacer una buena sopa no hace falta prisa. Se corta la cebolla muy fina, se deja dorar con un poco de aceite
y se añade el agua cuando el olor llena la cocina. Lo demás depende de lo que haya en casa: una patata, dos
zanahorias, un puñado de arroz.
"""
)

_RUSSIAN = _prose(
    """
Вечером дед садился у окна и чинил часы. Он никогда не торопился: сначала долго слушал, как они идут, потом
открывал крышку и только тогда брал в руки отвёртку. Мы знали, что мешать ему нельзя.
"""
)

_CHINESE = (
    "图书馆的门口有一棵很老的树。春天，学生们坐在树下读书；夏天，他们在那里躲太阳。到了秋天，叶"
    "子落在书页上，有人把它们夹进书里，几年以后再打开，还能闻到那一年的味道。"
)

_JAPANESE = (
    "駅前の小さな喫茶店では、毎朝同じ時間に同じ曲が流れる。店主は常連の足音を聞き分け、扉が開く前に豆を挽き始める。"
)

_LIST = """Shopping list for Saturday:
1. 2 kg of flour, 500 g of butter, 12 eggs
2. 3 lemons (unwaxed), 1 vanilla pod
3. Candles: one for each year, so 7 in total

Total budget: $45.00. Spent last time: $38.72. Left over: $6.28."""

_DIALOGUE = """"Is the train late?" asked the woman with the green suitcase.
"No," said the guard. "The train is on time. It is the track that is late."
She looked at him for a moment. "I don't understand."
"Neither do they," he said, and pointed at the workers, who were standing around a hole and looking into it."""

# Every text is scored on its own, after BOS where the model uses one.
TEXTS = (
    _HARBOUR,
    _ESSAY,
    _CODE,
    _GERMAN,
    _FRENCH,
    _SPANISH,
    _RUSSIAN,
    _CHINESE,
    _JAPANESE,
    _LIST,
    _DIALOGUE,
)

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "The three most important things to know about water are",
    "In 1969, the first human beings",
    "Q: What is 12 + 7?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "Die wichtigste Stadt in Deutschland ist",
    "for (int i = 0; i < n; i++) {\n",
    "The difference between a cat and a dog is that",
    # predictable, so that many tokens are sure
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "The days of the week are Monday, Tuesday, Wednesday,",
    "red blue red blue red blue red blue",
    "<ul>\n  <li>one</li>\n  <li>two</li>\n  <li>three</li>\n",
)
