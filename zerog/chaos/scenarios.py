"""The scenarios: what each injures, and what must hold beside lost = double result = stale write = 0."""

from __future__ import annotations

from zerog.chaos import processes as by
from zerog.chaos import surroundings as around
from zerog.chaos.run import Scenario

SCENARIOS = {
    one.name: one
    for one in (
        Scenario("K1", "kill -9 a random agent, restarted at once", (500, 60), (20_000, 3_000), by.kill_agents,
                 pause=(0.3, 1.0), judge=by.judge_k1, lone=False),
        Scenario("K2", "kill -9 a child; a job that always kills its child", (300, 40), (10_000, 1_000),
                 by.kill_children, pause=(0.2, 0.8), judge=by.judge_k2, lone=False),
        Scenario("K3", "kill -9 the server, clients repeat with their keys", (500, 10), (20_000, 1_000),
                 by.kill_server, pause=(1.0, 3.0), judge=by.judge_k3, once=True),
        Scenario("K4", "kill -9 beanstalkd with a binlog, restarted after 0 to 5 s", (300, 5), (10_000, 300),
                 by.kill_queue, pause=(3.0, 5.0), judge=by.judge_k4, queue="beanstalkd-durable",
                 once=True),
        Scenario("K5", "the queue forgets everything", (300, 3), (10_000, 100), by.wipe_queue, pause=(0.5, 1.0),
                 burst=True, once=True),
        Scenario("P1", "SIGSTOP an agent under a job for 2 to 4 leases, then SIGCONT", (60, 6), (5_000, 500),
                 by.stop_agents, lasts=3, judge=by.judge_p1, lone=False),
        Scenario("P2", "SIGSTOP beanstalkd, or the server, for 2 leases", (60, 2), (3_000, 100),
                 by.stop_queue_and_server, lasts=2, judge=by.judge_p2, queue="beanstalkd",
                 once=True),
        Scenario("D1", "the store's disk is full; its files may not grow", (60, 2), (1_000, 20), around.fill_disk,
                 lasts=1, judge=around.judge_d1, prepare=around.put_store_on_small_disk, store="sqlite"),
        Scenario("S1", "5 % of all calls of the store fail, 5 % of writes meet a conflict, it is away for 6 leases",
                 (300, 1), (20_000, 10), around.fail_store, pause=(5.0, 10.0), lasts=6, judge=around.judge_s1,
                 prepare=around.let_store_fail),
        Scenario("N1", "the network to beanstalkd stops, loses answers, is cut within a line", (180, 3), (25_000, 15),
                 around.tear_network, prepare=around.put_proxy_before_queue, lasts=1, queue="beanstalkd",
                 once=True),
        Scenario("T1", "the clock jumps by 200 s, and back by an hour", (60, 2), (1_000, 20), around.jump,
                 lasts=3, prepare=around.fake_clock, once=True, puts_off=around.FORWARD),
        Scenario("B1", "everything is killed over a backlog and starts anew", (5_000, 1), (100_000, 1),
                 around.restart_all, prepare=around.start_without_agents, burst=True, length=(0.0, 0.02), long=0.0),
    )
}  # fmt: skip
